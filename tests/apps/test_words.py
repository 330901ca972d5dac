"""Prompts and captions from what calls each LoRA."""

from pathlib import Path

from apps.words import Words, caption_of, prompt_of, world_words

WORLD = Path("worlds/emoji")


def test_subjects_come_first_and_styles_after_in():
    words = world_words(WORLD)
    both = [words["retro"], words["panda"]]
    assert prompt_of(both) == "a <v1> mammal in <v17> style"
    assert caption_of(both) == "a panda in retro style"
    assert caption_of([words["owl"], words["panda"]]) == "an owl and a panda"
    assert prompt_of([words["retro"]]) == "something in <v17> style"


def test_without_a_world_trigger_words_are_all_there_is(tmp_path):
    assert world_words(tmp_path) == {}
    silent = Words(prompt="", caption="")
    assert prompt_of([Words(prompt="sks dog, red", caption=""), silent]) == "sks dog, red"
    assert prompt_of([]) == ""
