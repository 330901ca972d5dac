"""Rows in ScienceQA's own fields: read, checked, and put into words."""

import random
from collections.abc import Mapping, Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from datasets import Dataset, Image

from mole_vl.faults import refuse
from nlp.data import is_text
from nlp.scienceqa.formats import Format, Question
from nlp.tables import check_columns, each, load_splits, loading

SPLITS = ("train", "validation", "test")
FIELDS = (
    *("image", "question", "choices", "answer", "hint", "task", "grade", "subject", "topic"),
    *("category", "skill", "lecture", "solution"),
)
"""ScienceQA's columns, in its order."""

Values = dict[str, Any]
"""A row's values by column."""


def question_of(values: Mapping[str, Any]) -> Question:
    """A row as a question.

    Raises:
        ValueError: Choices that are no list of two or more texts, an answer that is none of their
            places, a text that is none.
    """
    choices, answer = values["choices"], values["answer"]
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise ValueError(f"choices is {choices!r}, expected a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"choices is {choices!r}, expected 2 to {len(LETTERS)} texts")
    if not all(_has_text(choice) for choice in choices):
        raise ValueError(f"choices is {choices!r}, expected texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"answer is {answer!r}, expected the place of one of the {len(choices)} choices, "
            f"0 to {len(choices) - 1}"
        )
    if not _has_text(values["question"]):
        raise ValueError(f"question is {values['question']!r}, expected some text")
    texts = {}
    for column in ("hint", "lecture", "solution", "rationale"):
        text = values.get(column)
        if text is not None and not (isinstance(text, str) and is_text(text)):
            raise ValueError(f"{column} is {text!r}, expected text")
        texts[column] = text or ""
    return Question(question=values["question"], choices=tuple(choices), answer=answer, **texts)


def in_words(values: Mapping[str, Any], form: Format) -> Values:
    """A row with `instruction`, `input` and `output`, its answer a letter.

    Args:
        values: In ScienceQA's fields, and any others.
        form: How it is asked and answered.

    Raises:
        ValueError: As of `question_of`.
    """
    one = question_of(values)
    own = {name: values[name] for name in FIELDS if name in values}
    others = {name: value for name, value in values.items() if name not in FIELDS}
    return {
        "image": None,
        **own,
        "answer": one.letter,
        **others,
        "input": "",
        "instruction": form.prompt(one),
        "output": form.answer(one),
    }


def read_splits(name: str, form: Format) -> dict[str, list[Values]]:
    """Rows without a picture, of each of `SPLITS`, as `in_words` puts them.

    A dataset of one split is divided: three fifths to learn from, one each for the others, all of
    a question's rows on one side.

    Args:
        name: As for `nlp.tables.load_table`.
        form: How they are asked and answered.

    Raises:
        FileNotFoundError: There is no such file or dataset, or the Hub cannot be reached.
        ValueError: What is there cannot be read; it lacks a split or a column; rows that are no
            questions, each by its number from 0; a split whose rows all have pictures.
    """
    where = f"dataset: {name}"
    with loading(where):
        tables = load_splits(name)
    alone = len(tables) == 1
    lacking = [] if alone else [split for split in SPLITS if split not in tables]
    refuse(where, [f"no split {split!r} (found {', '.join(tables)})" for split in lacking])
    wanted = ("question", "choices", "answer", *form.reads)
    found = {}
    for split in tables if alone else SPLITS:
        part = f"{where}, split {split!r}"
        check_columns(part, tables[split], wanted)
        found[split] = _read(part, tables[split], form)
    return _divided(where, next(iter(found.values()))) if alone else found


def _has_text(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip()) and is_text(text)


def _read(where: str, table: Dataset, form: Format) -> list[Values]:
    whole = len(table)
    numbers = _without_picture(table)
    if not numbers:
        raise ValueError(f"{where}: all {whole} rows have pictures, which a text model cannot see")
    kept = table.remove_columns([name for name in ("image",) if name in table.column_names])
    with loading(where):
        values = kept.select(numbers).to_list()
    rows = each(where, zip(numbers, values, strict=True), lambda one: in_words(one, form))
    if len(rows) < whole:
        print(f"{where}: {whole - len(rows)} of {whole} rows have a picture and are left out")
    return rows


def _without_picture(table: Dataset) -> list[int]:
    """Numbers of the rows whose image is empty."""
    if "image" not in table.column_names:
        return list(range(len(table)))
    images = table.select_columns(["image"])
    if isinstance(images.features["image"], Image):
        images = images.cast_column("image", Image(decode=False))
    empty = images.with_format("arrow")[:]["image"].is_null().to_pylist()
    return [number for number, one in enumerate(empty) if one]


def _divided(where: str, rows: Sequence[Values]) -> dict[str, list[Values]]:
    questions = list(dict.fromkeys(row["instruction"] for row in rows))
    if len(questions) < len(SPLITS):
        raise ValueError(
            f"{where}: {len(questions)} questions in one split, expected three or more: they are "
            "divided into train, validation and test"
        )
    random.Random(0).shuffle(questions)
    part = max(1, len(questions) // 5)
    side = dict.fromkeys(questions[2 * part :], "train")
    side |= dict.fromkeys(questions[:part], "validation")
    side |= dict.fromkeys(questions[part : 2 * part], "test")
    return {split: [r for r in rows if side[r["instruction"]] == split] for split in SPLITS}
