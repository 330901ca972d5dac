"""ScienceQA's texts, letter by letter."""

import json

import pytest

from nlp.scienceqa.formats import INPUTS, OUTPUTS, Format, Question, format_of
from nlp.scienceqa.letters import letter_of, letters_in
from nlp.scienceqa.numbers import by_layer, numbers, words
from nlp.scienceqa.template import template_of

ONE = Question(
    question="Which is  a solid?\nPick one.",
    choices=("milk", "rock"),
    answer=1,
    hint=" A hint.\n",
    lecture="L1.\nL2.",
    solution="S1.",
)
Q = "Question: Which is  a solid?\nPick one.\n"
C = "Context: A hint.\n"
M = "Options: (A) milk (B) rock\n"
L = r"L1.\nL2."
ASKED = {
    "CQM": C + Q + M,
    "QCM": Q + C + M,
    "QM": Q + M,
    "QC": Q + C,
    "QCML": Q + C + M + f"BECAUSE: {L}\n",
    "QCME": Q + C + M + "BECAUSE: S1.\n",
    "QCMLE": Q + C + M + f"BECAUSE: {L} S1.\n",
    "QCLM": Q + C + f"BECAUSE: {L}\n" + M,
    "QCEM": Q + C + "BECAUSE: S1.\n" + M,
    "QCLEM": Q + C + f"BECAUSE: {L} S1.\n" + M,
    "QCMA": Q + C + M + "Answer: The answer is B.\n",
    "QCA": Q + C + "Answer: The answer is B. \nBECAUSE:",
    "CQMG": C + Q + M + f"Solution: {L} S1.\n",
    "QCMG": Q + C + M + f"Solution: {L} S1.\n",
}
SAID = {
    "A": "Answer: The answer is B.",
    "AL": "Answer: The answer is B. BECAUSE: S1.",
    "AE": f"Answer: The answer is B. BECAUSE: {L}",
    "ALE": f"Answer: The answer is B. BECAUSE: {L} S1.",
    "AEL": f"Answer: The answer is B. BECAUSE: S1. {L}",
    "LA": f"Answer: {L} The answer is B.",
    "EA": "Answer: S1. The answer is B.",
    "LEA": f"Answer: {L} S1. The answer is B.",
    "ELA": f"Answer: S1. {L} The answer is B.",
    "LE": f"Solution: {L} S1..",
    "E": "Solution: S1.",
}


@pytest.mark.parametrize("name", INPUTS)
def test_each_input_is_asked_as_its_name_says(name):
    assert format_of(f"{name}-A").prompt(ONE) == ASKED[name]


@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output_is_said_as_its_name_says(name):
    assert format_of(f"CQM-{name}").answer(ONE) == SAID[name]


def test_the_readmes_sample_is_its_text():
    one = Question(
        question="Is the following trait inherited or acquired?\nSasha is good at knitting hats.",
        choices=("acquired", "inherited"),
        answer=0,
        hint="Hint: People who can knit had to learn how to do it.",
    )
    form = format_of("CQM-A")
    assert form.prompt(one) == (
        "Context: Hint: People who can knit had to learn how to do it.\n"
        "Question: Is the following trait inherited or acquired?\n"
        "Sasha is good at knitting hats.\n"
        "Options: (A) acquired (B) inherited\n"
    )
    assert form.answer(one) == "Answer: The answer is A."
    assert template_of("alpaca").prompt(form.prompt(one), "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n" + form.prompt(one) + "\n\n### Response:\n"
    )


BARE = Question(question="Why?", choices=("a", "b"), answer=0)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("QCM-ALE", "Question: Why?\nContext: N/A\nOptions: (A) a (B) b\n", "The answer is A."),
        ("QM-LEA", "Question: Why?\nOptions: (A) a (B) b\n", "The answer is A."),
        ("QCML-AL", "Question: Why?\nContext: N/A\nOptions: (A) a (B) b\nBECAUSE: \n",
         "The answer is A."),
    ],
)  # fmt: skip
def test_nothing_is_told_where_there_is_nothing(name, asked, said):
    assert format_of(name).prompt(BARE) == asked
    assert format_of(name).answer(BARE) == f"Answer: {said}"


def test_half_of_lecture_and_solution_leaves_no_second_space():
    half = Question(question="Why?", choices=("a", "b"), answer=0, solution="S.")
    for name in ("ALE", "AEL", "AL"):
        assert format_of(f"QM-{name}").answer(half) == "Answer: The answer is A. BECAUSE: S."
    assert format_of("QM-ELA").answer(half) == "Answer: S. The answer is A."
    assert format_of("QCMLE-A").prompt(half).endswith("BECAUSE: S.\n")


def test_a_rationale_that_was_given_stands_as_it_is():
    one = Question(question="Why?", choices=("a", "b"), answer=0, rationale="Solution: so.")
    assert format_of("QCMG-A").prompt(one).endswith("(B) b\nSolution: so.\n")


def test_a_format_knows_what_it_reads():
    assert format_of("CQM-A").reads == ()
    assert format_of("CQM-AL").reads == ("solution",)
    assert format_of("QCML-AE").reads == ("lecture",)
    assert format_of("QCMG-A").reads == ("lecture", "solution")
    assert {name for name in INPUTS if Format(name, "A").open} == {"CQM", "QCM", "QM", "QC"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("CQM", "'CQM', expected INPUT-OUTPUT such as CQM-A, with an input of CQM, QCM"),
        ("CQM-A-A", "expected INPUT-OUTPUT"),
        ("CMQ-A", "prompt_format: input is 'CMQ', expected one of CQM, QCM"),
        ("CMQ-Z", "input is 'CMQ'.*; output is 'Z', expected one of A, AL"),
    ],
)
def test_an_unknown_format_is_told_with_the_known_ones(name, told):
    with pytest.raises(ValueError, match=told):
        format_of(name)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer: The answer is A.", "A"),
        ("The answer is A. The answer is A.", "A"),
        ("Answer: S. The answer is B. BECAUSE: C.", "B"),
        ("The answer is A. The answer is B.", None),
        ("The answer is A", None),
        ("The answer is Apple.", None),
        ("The answer is (A).", None),
        ("The answer is Z.", None),
        ("", None),
    ],
)
def test_the_letter_is_read_where_it_is_the_only_one(text, found):
    assert letter_of(text, "AB") == found


def test_any_letter_counts_where_no_options_are_known():
    assert letter_of("The answer is Z.") == "Z"
    assert letters_in("The answer is A. The answer is B.") == ["A", "B"]


def test_a_template_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {
        "description": "mine",
        "prompt_input": "{input} {x} {instruction}:",
        "prompt_no_input": "{instruction} {{}}?",
        "response_split": "?",
    }
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/mine.json").write_text(json.dumps(own))
    for name in ("mine", str(tmp_path / "templates/mine.json")):
        found = template_of(name)
        assert found.prompt("a {input} b", None) == "a {input} b {{}}?"
        assert found.prompt("do", "{instruction}") == "{instruction} {x} do:"
    assert template_of("") == template_of("alpaca")
    assert "### Input:\nthis\n\n### Response:\n" in template_of("alpaca").prompt("do", "this")


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (None, "prompt_template_name: templates.mine.json is no file, expected .* or alpaca"),
        ({"prompt_input": "{instruction}{input}"}, "no text 'prompt_no_input'"),
        (
            {"prompt_input": "{instruction}", "prompt_no_input": "{instruct}"},
            "mine.json: prompt template: prompt_input lacks {input}; prompt_no_input lacks",
        ),
    ],
)
def test_a_template_that_cannot_be_is_told(tmp_path, monkeypatch, held, told):
    monkeypatch.chdir(tmp_path)
    if held is not None:
        (tmp_path / "templates").mkdir()
        (tmp_path / "templates/mine.json").write_text(json.dumps(held))
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        template_of("mine")


def test_numbers_are_one_for_all_or_one_for_each_layer():
    assert numbers("top_k", "2, 4,4") == (2, 4, 4) == numbers("top_k", (2, 4, 4))
    assert numbers("top_k", "8") == 8 == numbers("top_k", 8)
    assert by_layer("top_k", 3, 2) == (3, 3)
    assert by_layer("top_k", (3, 4), 2) == (3, 4)
    assert words("targets", "q_proj, v_proj") == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: numbers("lora_r", "8,8,"), "lora_r is '8,8,', expected a whole number, or one"),
        (lambda: numbers("lora_r", "8,x"), "lora_r is '8,x'"),
        (lambda: numbers("lora_r", ""), "lora_r is ''"),
        (lambda: numbers("lora_r", "8,0"), "expected numbers from 1 on"),
        (lambda: numbers("lora_r", -1), "expected numbers from 1 on"),
        (lambda: numbers("lora_r", ()), "expected numbers from 1 on"),
        (lambda: by_layer("lora_r", (1, 2, 3), 2), "lora_r has 3 numbers, .* has 2 layers"),
        (lambda: words("targets", "q_proj,"), "targets is 'q_proj,', expected names"),
    ],
)
def test_lists_that_cannot_be_are_told(call, told):
    with pytest.raises(ValueError, match=told):
        call()
