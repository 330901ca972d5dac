"""MoLA asked one question."""

import json

import pytest

from nlp.scienceqa.ask import AskConfig, ask
from nlp.scienceqa.template import ALPACA
from tests.nlp.scienceqa_place import (  # place is a fixture
    place as place,
    results,
    typed,
)
from tests.nlp.scienceqa_toys import (
    KNITTING,
    pick,
)
from tests.nlp.test_task_moe import wandb as wandb  # a fixture


def question(place, **changes):
    given = {
        "question": "Pick milk.", "choices": ("milk", "rock"), "base_model": str(place / "base"),
        "mola_weights": place / "mola", "max_new_tokens": 9,
    }  # fmt: skip
    return AskConfig(**{**given, **changes})


def test_one_question_is_answered(place, tmp_path, capsys):
    arguments = ["--base_model", place / "base", "--mola_weights", place / "mola"]
    for number, said in ((0, "A.\n(A) milk"), (1, "B.\n(B) rock")):
        one = pick(number)
        choices = json.dumps(one["choices"])
        typed(tmp_path, "ask", "--question", one["question"], "--choices", choices, *arguments)
        assert capsys.readouterr().out.endswith(f"Answer: The answer is {said}\n")
    whole = results(place / "sqa/scienceq_test.json")[0]["instruction"]
    typed(tmp_path, "ask", "--instruction", whole, *arguments)
    assert capsys.readouterr().out.endswith("Answer: The answer is A.\n")


def test_the_authors_sample_is_asked_in_their_words():
    config = AskConfig(
        question=KNITTING["question"], choices=tuple(KNITTING["choices"]), hint=KNITTING["hint"]
    )
    assert ALPACA.prompt(config.whole) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n"
        "Context: Hint: People who can knit had to learn how to do it.\n"
        "Question: Is the following trait inherited or acquired?\n"
        "Sasha is good at knitting hats.\nOptions: (A) acquired (B) inherited\n\n\n### Response:\n"
    )


def test_answers_are_drawn_where_there_is_a_temperature(place):
    likeliest = ask(question(place))
    hot = [ask(question(place, temperature=30.0, seed=seed)) for seed in (0, 1, 0)]
    assert hot[0] == hot[2] != hot[1] and likeliest not in hot
    # Of one token, or of the least share, the likeliest is drawn at any temperature.
    for narrow in ({"top_k": 1}, {"top_k_g": 1}, {"top_p": 1e-6}):
        assert ask(question(place, temperature=3.0, **narrow)) == likeliest
    assert question(place, temperature=0.1, top_p=0.75, top_k_g=20).drawing == {
        "do_sample": True, "temperature": 0.1, "top_p": 0.75, "top_k": 20,
    }  # fmt: skip
    assert question(place, temperature=0.1).drawing["top_k"] == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"question": None}, "question is empty, expected some text, or an instruction"),
        ({"choices": ("a",)}, "choices are 1, expected 2 to 26"),
        ({"instruction": "x"}, "question, choices and hint do not go with an instruction"),
        ({"top_p": 0.5}, "top_p: given with temperature 0, where nothing is drawn"),
        ({"top_p": 1.5, "temperature": 1}, "top_p is 1.5, expected 0 < top_p <= 1"),
        ({"temperature": -1}, "temperature is -1, expected at least 0"),
        ({"top_k": 1, "top_k_g": 2, "temperature": 1}, "two names of one setting"),
        ({"prompt_format": "QCML-A"}, "whose input tells more than question"),
        ({"prompt_format": "A"}, "expected INPUT-OUTPUT"),
    ],
)
def test_a_question_that_cannot_be_is_told(place, given, told):
    with pytest.raises(ValueError, match=told):
        question(place, **given)
