"""Rows of instructions, as Alpaca has them: instruction, input (or none) and output.

A template puts instruction and input into words, behind which a model is to say the output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset

from mole_vl.faults import refuse, told
from mole_vl.files import check_file, read_object
from nlp.data import EncodedRow, TextRow, Tokenizer, is_text
from nlp.tables import load_table, loading

_COLUMNS = ("instruction", "input", "output")
_KEYS = {"description", "prompt_input", "prompt_no_input", "response_split"}
_OLDER = {"description", "parameter", "prompt", "prompt_no_input"}


@dataclass(frozen=True)
class AlpacaTemplate:
    """How an instruction is put to a model.

    Args:
        with_input: Format string of `{instruction}` and `{input}`.
        without: Format string of `{instruction}`, for rows without an input.
    """

    with_input: str
    without: str

    def prompt(self, instruction: str, given: str = "") -> str:
        """The prompt of an instruction and what is given with it."""
        if not given:
            return self.without.format(instruction=instruction)
        return self.with_input.format(instruction=instruction, input=given)


AS_IT_STANDS = AlpacaTemplate("{instruction}\n{input}", "{instruction}")
"""No template at all."""
TEMPLATES: Mapping[str, AlpacaTemplate] = {
    "alpaca": AlpacaTemplate(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "moe_peft": AlpacaTemplate(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Output:\n",
        "### Instruction:\n{instruction}\n\n### Output:\n",
    ),
}
"""MoE-PEFT's own templates by name."""


def read_template(setting: str, name: str) -> AlpacaTemplate:
    """A built-in template, or that of a JSON file in MoE-PEFT's form or m-LoRA's first.

    MoE-PEFT's has prompt_input and prompt_no_input (and a response_split, for which nothing is
    searched here: an answer is what comes behind the prompt). m-LoRA's has prompt and
    prompt_no_input, each with `{output}` at its end.

    Args:
        setting: Name of the setting, for messages.
        name: The built-in one's, or the file's path.

    Raises:
        FileNotFoundError: Neither.
        ValueError: A file of another form.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    file = Path(name)
    check_file(setting, file, f"a template's JSON file or one of {', '.join(TEMPLATES)}")
    given = read_object(file)
    older = "prompt" in given
    known = _OLDER if older else _KEYS
    keys = ("prompt" if older else "prompt_input", "prompt_no_input")
    faults = [f"unknown key {key}, expected {', '.join(sorted(known))}" for key in given
              if key not in known]  # fmt: skip
    for key, columns in zip(keys, ({"instruction", "input"}, {"instruction"}), strict=True):
        faults += [f"{key}: {fault}" for fault in _faults(given.get(key), columns, older)]
    refuse(f"{setting}: {file}", faults)
    return AlpacaTemplate(*(given[key].partition("{output}")[0] for key in keys))


def _faults(text: Any, columns: set[str], older: bool) -> list[str]:
    """What is wrong with a template's text."""
    if not isinstance(text, str):
        return [f"{text!r}, expected a text with {{instruction}}"]
    if older and ("{output}" not in text or text.partition("{output}")[2].strip()):
        return [f"{text!r}, expected {{output}} at its end"]
    try:
        parsed = list(Formatter().parse(text.partition("{output}")[0] if older else text))
    except ValueError as error:
        return [f"{text!r} is no template ({error})"]
    found = {name for _, name, _, _ in parsed if name is not None}
    listed = ", ".join(sorted(columns))
    if not {"instruction"} <= found <= columns:
        return [f"it names {', '.join(sorted(found)) or 'nothing'}, expected {listed}"]
    return []


def load_alpaca(setting: str, data: str) -> Dataset:
    """The rows of a data set, as they are.

    Args:
        setting: Name of the setting, for messages.
        data: A JSON file, a Hub id, or `ID:SUBSET`.

    Raises:
        FileNotFoundError: There is no such file or data set, or the Hub cannot be reached.
        ValueError: It cannot be read, has no rows, or lacks instruction or output.
    """
    name, _, subset = (data, "", "") if Path(data).exists() else data.partition(":")
    with loading(f"{setting}: {data}"):
        table = load_table(name, subset or None)
    refuse(
        f"{setting}: {data}",
        [
            f"no column {column!r} (found {', '.join(table.column_names)})"
            for column in ("instruction", "output")
            if column not in table.column_names
        ],
    )
    return table


def alpaca_rows(setting: str, table: Dataset, template: AlpacaTemplate, task: str) -> list[TextRow]:
    """A data set's rows in the words of a template; an output may be empty.

    Args:
        setting: Name of the setting that holds the data set, for messages.
        table: As `load_alpaca` gives it.
        template: Puts them into words.
        task: What their task is called.

    Raises:
        ValueError: Rows whose instruction is empty, or with a value that is no text, each by its
            number from 0.
    """
    rows, faults = [], []
    columns = [column for column in _COLUMNS if column in table.column_names]
    with loading(setting):
        found = table.select_columns(columns).to_list()
    for number, values in enumerate(found):
        instruction, given, output = (values.get(column) for column in _COLUMNS)
        given = "" if given is None else given
        odd = [
            f"row {number}: {column!r} is {value!r}, expected some text"
            for column, value in zip(_COLUMNS, (instruction, given, output), strict=True)
            if not isinstance(value, str)
            or not is_text(value)
            or (column == "instruction" and not value.strip())
        ]
        faults += odd
        if not odd:
            rows.append(TextRow(template.prompt(instruction, given), output, task))
    refuse(setting, told(faults))
    return rows


def encode_alpaca(
    rows: Sequence[TextRow], tokenizer: Tokenizer, *, cutoff: int | None, whole: bool = False
) -> list[EncodedRow]:
    """Token ids of rows, their answers as they stand behind the prompts, and the end token.

    Args:
        rows: The rows.
        tokenizer: The model's.
        cutoff: The most tokens of a row: what comes behind them is cut off, and rows of whose
            answers nothing is left are left out. None for no end.
        whole: Whether the prompts are scored too: all but the first token stands as the answer.
    """
    found = []
    for row in rows:
        prompt = tuple(tokenizer(row.prompt)["input_ids"])
        both = tuple(tokenizer(row.prompt + row.answer)["input_ids"])
        if both[: len(prompt)] == prompt:
            answer = both[len(prompt) :]
        else:
            # A token spans the seam: asked for an answer, the model is shown the prompt's own.
            answer = tuple(tokenizer(row.answer, add_special_tokens=False)["input_ids"])
        ids = (*prompt, *answer, tokenizer.eos_token_id)[:cutoff]
        seam = 1 if whole else len(prompt)
        if len(ids) > seam:
            found.append(EncodedRow(ids[:seam], ids[seam:], row))
    return found
