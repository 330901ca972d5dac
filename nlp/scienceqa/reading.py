"""What a training learns: instructions with their answers, or whole texts."""

from collections.abc import Mapping
from typing import Any

from nlp.data import TextRow, is_text
from nlp.scienceqa.template import Template
from nlp.tables import each, rows_with


def instructions(path: str, template: Template) -> list[TextRow]:
    """The rows of a dataset's split train as prompts and answers.

    Args:
        path: As for `nlp.tables.load_table`, with columns instruction, output and, if need be,
            input.
        template: The text around an instruction.

    Raises:
        FileNotFoundError: There is no such dataset.
        ValueError: It cannot be read; it lacks a column; rows without text, each by its number
            from 0.
    """

    def row(values: Mapping[str, Any]) -> TextRow:
        prompt = prompt_of(values, template)
        return TextRow(prompt, text_of(values, "output"), "instruction")

    where = f"data_path: {path}"
    return each(where, enumerate(rows_with(where, path, ("instruction", "output"))), row)


def texts(path: str) -> list[TextRow]:
    """The rows of a dataset's split train as texts without a prompt.

    Args:
        path: As for `nlp.tables.load_table`, with the column output.

    Raises:
        FileNotFoundError: There is no such dataset.
        ValueError: As of `instructions`.
    """
    where = f"data_path: {path}"
    rows = enumerate(rows_with(where, path, ("output",)))
    return each(where, rows, lambda values: TextRow("", text_of(values, "output"), "text"))


def prompt_of(values: Mapping[str, Any], template: Template) -> str:
    """A row's instruction, and its input if it has one, as a model is asked.

    Raises:
        ValueError: No text.
    """
    given = values.get("input")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"input is {given!r}, expected text")
    return template.prompt(text_of(values, "instruction"), given)


def text_of(values: Mapping[str, Any], column: str) -> str:
    """A row's text in a column.

    Raises:
        ValueError: There is none.
    """
    text = values[column]
    if not isinstance(text, str) or not text.strip() or not is_text(text):
        raise ValueError(f"{column} is {text!r}, expected some text")
    return text
