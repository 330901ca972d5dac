"""Rows of instructions, their templates, and what of them is scored."""

import json

import pytest
from datasets import Dataset, config as datasets_config

from nlp.alpaca import AS_IT_STANDS, alpaca_rows, encode_alpaca, load_alpaca, read_template
from nlp.data import TextRow
from tests.nlp.toys import tiny_tokenizer

HEAD = "Below is an instruction that describes a task"
NEWER = {
    "description": "x",
    "prompt_input": "{instruction}|{input}:",
    "prompt_no_input": "{instruction}:",
    "response_split": ":",
}
OLDER = {
    "description": "x",
    "parameter": ["instruction", "input", "output"],
    "prompt": "{instruction}|{input}:{output}\n",
    "prompt_no_input": "{instruction}:{output}",
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def written(given):
        file = tmp_path / "file.json"
        file.write_text(json.dumps(given))
        return str(file)

    return written


def test_templates_are_the_alpaca_projects():
    alpaca = read_template("prompt", "alpaca")
    assert alpaca.prompt("Add.", "1, 2") == (
        f"{HEAD}, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n"
    )
    assert alpaca.prompt("Add {x}.") == (
        f"{HEAD}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Response:\n"
    )
    short = read_template("prompt", "moe_peft")
    assert short.prompt("A", "B") == "### Instruction:\nA\n\n### Input:\nB\n\n### Output:\n"
    assert AS_IT_STANDS.prompt("{input}") == "{input}"


@pytest.mark.parametrize("given", [NEWER, OLDER])
def test_templates_of_files_are_read(written, given):
    template = read_template("prompt", written(given))
    assert template.prompt("a", "b") == "a|b:"
    assert template.prompt("a") == "a:"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**NEWER, "prompt_imput": "x"}, "unknown key prompt_imput, expected description, promp"),
        ({**NEWER, "prompt_input": None}, "prompt_input: None, expected a text with {instruction}"),
        ({**NEWER, "prompt_input": "{input}"}, "names input, expected input, instruction"),
        ({**NEWER, "prompt_no_input": "{instruction}{input}"}, "prompt_no_input: it names input, "),
        ({**NEWER, "prompt_input": "{"}, "prompt_input: '{' is no template"),
        ({**OLDER, "prompt": "{instruction}"}, "prompt: .*, expected {output} at its end"),
        ({**OLDER, "prompt": "{instruction}{output}!"}, "prompt: .*, expected {output} at its end"),
    ],
)
def test_templates_that_do_not_hold_are_told(written, given, message):
    with pytest.raises(ValueError, match=r"prompt of a: .*file\.json: .*" + message):
        read_template("prompt of a", written(given))


def test_a_template_that_is_not_there_is_told():
    with pytest.raises(FileNotFoundError, match="prompt: gone is no file, expected a template's J"):
        read_template("prompt", "gone")


def test_rows_have_an_input_or_none(written):
    file = written(
        [
            {"instruction": "a", "input": "b", "output": "c"},
            {"instruction": "d", "input": None, "output": ""},
            {"instruction": "e", "input": "", "output": "f"},
        ]
    )
    template = read_template("prompt", "moe_peft")
    rows = alpaca_rows("data", load_alpaca("data", file), template, "task")
    assert rows == [
        TextRow(template.prompt("a", "b"), "c", "task"),
        TextRow(template.prompt("d"), "", "task"),
        TextRow(template.prompt("e"), "f", "task"),
    ]


def test_rows_that_do_not_hold_are_told(written):
    with pytest.raises(ValueError, match=r"data: .*no column 'output' \(found instruction\)"):
        load_alpaca("data", written([{"instruction": "a"}]))
    with pytest.raises(FileNotFoundError, match=r"data: gone.json, .*there is no such file"):
        load_alpaca("data", "gone.json")
    with pytest.raises(FileNotFoundError, match=r"data: gone:part, .*no Hub id"):
        load_alpaca("data", "gone:part")
    table = Dataset.from_list(
        [
            {"instruction": " ", "input": "", "output": "b"},
            {"instruction": "a", "input": "", "output": None},
        ]
    )
    expected = "data: row 0: 'instruction' is ' ', expected some text; row 1: 'output' is None"
    with pytest.raises(ValueError, match=expected):
        alpaca_rows("data", table, AS_IT_STANDS, "task")


def test_answers_alone_are_scored_unless_prompts_are_too():
    tokenizer = tiny_tokenizer()
    row = TextRow("ab:", "cd", "task")
    ids = tuple(tokenizer("ab:cd")["input_ids"])
    (found,) = encode_alpaca([row], tokenizer, cutoff=None)
    assert (found.prompt, found.answer) == (ids[:3], (*ids[3:], 0))
    (whole,) = encode_alpaca([row], tokenizer, cutoff=None, whole=True)
    assert (whole.prompt, whole.answer) == (ids[:1], (*ids[1:], 0))


def test_rows_are_cut_off_on_the_right():
    tokenizer = tiny_tokenizer()
    rows = [TextRow("ab:", "cd", "task"), TextRow("abc:", "", "task")]
    ids = tuple(tokenizer("ab:cd")["input_ids"])
    (found,) = encode_alpaca(rows, tokenizer, cutoff=4)
    assert (found.prompt, found.answer) == (ids[:3], ids[3:4])
    assert len(encode_alpaca(rows, tokenizer, cutoff=4, whole=True)) == 2
    assert encode_alpaca(rows, tokenizer, cutoff=3) == []


def test_a_token_across_the_seam_leaves_the_prompt_whole():
    class Merging:
        """One token a character, but `:c`, which is one."""

        eos_token_id = 0

        def __call__(self, text, *, add_special_tokens=True):
            parts = text.replace(":c", "%")
            return {"input_ids": [ord(letter) for letter in parts]}

    (found,) = encode_alpaca([TextRow("ab:", "cd", "task")], Merging(), cutoff=None)
    assert found.prompt == tuple(map(ord, "ab:"))
    assert found.answer == (ord("c"), ord("d"), 0)
