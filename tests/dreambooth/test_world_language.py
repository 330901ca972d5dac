"""The tokenizer and what the CLIPs are told."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from dreambooth.world.captions import IDENTIFIERS, plain_caption, with_article
from dreambooth.world.clip_task import Said, Shown
from dreambooth.world.tokenizer import MAX_LENGTH, learned_merges, make_tokenizer
from dreambooth.world.world import Pair, World

FOLDER = Path(__file__).parents[2] / "worlds" / "emoji"


@pytest.fixture(scope="module")
def world() -> World:
    return World.load(FOLDER)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> CLIPTokenizer:
    return make_tokenizer(world)


def test_identifiers_are_single_tokens_within_the_vocabulary(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenizer.tokenize("a <v1> mammal in <v20> style")
    assert tokens == ["a</w>", "<v1>", "mammal</w>", "in</w>", "<v20>", "style</w>"]
    assert len({tokenizer.convert_tokens_to_ids(name) for name in IDENTIFIERS}) == 24
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_merges_are_the_same_whatever_the_order_of_words() -> None:
    # A training that goes on another day must read the ids that it began with.
    words = ["bee", "bed", "car", "cap", "racing", "banana", "aaa"]
    merges = learned_merges(words)
    assert learned_merges(words[::-1]) == merges
    assert {"".join(merge) for merge in merges} >= {f"{word}</w>" for word in words}


def test_the_end_of_a_text_has_the_highest_id(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    ids = tokenizer(["a <v24> bird"], padding="max_length").input_ids[0]
    assert len(ids) == MAX_LENGTH
    assert ids.index(max(ids)) == 4


def test_any_word_can_be_spelled(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("Zebra, ünïcode 7").input_ids[1:-1]
    assert tokenizer.eos_token_id not in ids


def test_a_saved_tokenizer_reads_texts_the_same(
    tokenizer: CLIPTokenizer, world: World, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    texts = [plain_caption(pair) for pair in world.pairs()[::97]] + ["a <v3> fruit"]
    for reader in (CLIPTokenizer, AutoTokenizer):
        assert reader.from_pretrained(tmp_path)(texts).input_ids == tokenizer(texts).input_ids


@pytest.mark.parametrize(
    ("noun", "said"), [("apple", "an apple"), ("penguin", "a penguin"), ("grapes", "grapes")]
)
def test_nouns_get_their_article(noun: str, said: str) -> None:
    assert with_article(noun) == said


def test_a_caption_holds_for_the_pictures_it_describes(world: World) -> None:
    def pair(subject: str, style: str) -> Pair:
        return Pair(world.subject(subject), world.style(style))

    owl, duck = pair("owl", "noto"), pair("duck", "noto")

    def shown(*pairs: Pair, recoloured: bool = False) -> Shown:
        return Shown(pairs, recoloured)

    a_bird = Said(names=None, kinds=("bird",), style=None)
    an_owl = Said(names=("owl",), kinds=("bird",), style="noto")
    both = Said(names=("owl", "duck"), kinds=("bird", "bird"), style="noto")
    assert a_bird.holds_for(shown(owl)) and a_bird.holds_for(shown(duck))
    assert an_owl.holds_for(shown(owl)) and not an_owl.holds_for(shown(duck))
    assert not an_owl.holds_for(shown(pair("owl", "flat")))
    assert both.holds_for(shown(owl, duck)) and not both.holds_for(shown(duck, owl))
    assert not an_owl.holds_for(shown(owl, duck))
    assert a_bird.holds_for(shown(owl, recoloured=True))
    assert not an_owl.holds_for(shown(owl, recoloured=True))
    assert (a_bird.text, an_owl.text) == ("a bird", "an owl in noto style")
