"""Rows of any dataset: of a file, a folder or the Hub, through templates over its columns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from string import Formatter
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset

from mole_vl.faults import refuse
from mole_vl.files import check_file
from nlp.data import OTHERWISE, ROWS, TextRow, read_rows
from nlp.tables import each, load_table, loading

_TEMPLATES = tuple(key.name for key in fields(TextRow))


@dataclass(frozen=True, kw_only=True)
class DatasetRows:
    """Rows of a dataset, each put into words by templates over its columns.

    A template is a format string: `{question}` stands for the column of that name,
    `{answers[text][0]}` for a part of it, and a column of class labels for the label's name.

    Args:
        dataset: A file (.csv, .tsv, .json, .jsonl, .parquet), a folder of such files or one that
            `save_to_disk` wrote, or a Hub id.
        subset: Name of one of a Hub dataset's configurations; a file has none.
        split: The split, or a slice of it, such as `train[:16]`; a file is the split `train`.
        prompt: Template of what a model is shown.
        answer: Template of what it is to say.
        task: Name of the task, or its template.
        labels: Names of a column's whole numbers from 0, where the dataset itself does not know
            them, by column.
    """

    dataset: str
    subset: str | None = None
    split: str = "train"
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    task: str = "{task}"
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse(f"{type(self).__name__} of {self.dataset!r}", self.faults())

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [
            None if self.dataset else "dataset is empty, expected a file, a folder or a Hub id",
            *(_template_fault(key, getattr(self, key)) for key in _TEMPLATES),
            *(
                f"labels of {column!r} is empty, expected names"
                for column, names in self.labels.items()
                if not names
            ),
        ]

    def __str__(self) -> str:
        """What messages call it."""
        return f"{self.dataset}, split {self.split!r}"


RowSource: TypeAlias = Path | DatasetRows
"""Where rows come from: a file of JSON lines with prompt, answer and task, or a dataset."""


def rows_of(setting: str, source: RowSource) -> list[TextRow]:
    """The rows of a source.

    Args:
        setting: Name of the setting that holds the source, for messages.
        source: A file of JSON lines, or a dataset.

    Raises:
        FileNotFoundError: There is no such file or dataset, or the Hub cannot be reached.
        ValueError: What is there cannot be read or has no rows; columns that the templates ask for
            and the dataset lacks; rows without a text or with a label outside its list, each by
            its number from 0.
    """
    if isinstance(source, Path):
        check_file(setting, source, ROWS)
        if source.suffix in (".csv", ".tsv", ".parquet"):
            raise ValueError(f"{setting}: {source} is a table, expected {ROWS}; {OTHERWISE}")
        try:
            return read_rows(source)
        except ValueError as fault:
            raise ValueError(f"{setting}: {fault}") from fault
    return open_table(setting, source).rows()


@dataclass(frozen=True)
class TemplateTable:
    """A dataset that has the columns which its templates ask for; `open_table` opens one.

    Args:
        source: The dataset and its templates.
        where: What messages call it.
        table: Its split.
        names: Names of the whole numbers in columns of class labels.
    """

    source: DatasetRows
    where: str
    table: Dataset
    names: Mapping[str, Sequence[str]]

    def rows(self, places: Sequence[int] | None = None) -> list[TextRow]:
        """The rows at some places, counted from 0; all of them if not given.

        Raises:
            ValueError: Rows without a text or with a label outside its list, each by its number.
        """
        given = self._values(_TEMPLATES, places)
        return each(self.where, given, lambda values: self._row(values))

    def tasks(self) -> list[str]:
        """The task of every row; nothing else of them is read.

        Raises:
            ValueError: Rows without a task, or with a label outside its list, each by its number.
        """
        given = self._values(("task",), None)
        return each(self.where, given, lambda values: self._text("task", self._named(values)))

    def _row(self, values: Mapping[str, Any]) -> TextRow:
        named = self._named(values)
        return TextRow(**{key: self._text(key, named) for key in _TEMPLATES})

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return _named(values, self.names)

    def _text(self, key: str, values: Mapping[str, Any]) -> str:
        text = _Filling().vformat(getattr(self.source, key), (), values)
        if not text.strip():
            raise ValueError(f"{key!r} is {text!r}, expected some text")
        return text

    def _values(
        self, keys: Sequence[str], places: Sequence[int] | None
    ) -> Iterable[tuple[int, dict[str, Any]]]:
        """The values that templates ask for, by column, with the rows' numbers."""
        columns = sorted({c for key in keys for c in _columns(getattr(self.source, key))})
        chosen = range(len(self.table)) if places is None else places
        with loading(self.where):
            table = self.table if places is None else self.table.select(places)
            rows = table.select_columns(columns).to_list() if columns else [{}] * len(chosen)
        return zip(chosen, rows, strict=True)


def open_table(setting: str, source: DatasetRows) -> TemplateTable:
    """A dataset, whose columns are looked at.

    Raises:
        FileNotFoundError: As for `rows_of`.
        ValueError: As for `rows_of`, but for what its rows hold.
    """
    where = f"{setting}: {source}"
    with loading(where):
        table = load_table(source.dataset, source.subset, source.split)
    columns = sorted({c for key in _TEMPLATES for c in _columns(getattr(source, key))})
    found = ", ".join(table.column_names)
    refuse(
        where,
        [
            *(
                f"no column {column!r}, which the templates ask for (found {found})"
                for column in columns
                if column not in table.column_names
            ),
            *(
                f"no column {column!r}, which labels names (found {found})"
                for column in source.labels
                if column not in table.column_names
            ),
        ],
    )
    known = {c: kind.names for c, kind in table.features.items() if isinstance(kind, ClassLabel)}
    return TemplateTable(source, where, table, {**known, **source.labels})


def _template_fault(key: str, template: str) -> str | None:
    try:
        columns = _columns(template)
    except ValueError as error:
        return f"{key} is {template!r}, which is no template ({error})"
    if any(not column or column.isdigit() for column in columns):
        return f"{key} is {template!r}, expected a column's name between the braces"
    if not columns and key != "task":
        return f"{key} is {template!r}, expected at least one {{column}}"
    return None


def _columns(template: str) -> list[str]:
    """Names of the columns that a template asks for."""
    asked = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return [re.split(r"[.\[]", name)[0] for name in asked]


def _named(values: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A row's values, with class labels by name."""
    found = dict(values)
    for column in found.keys() & names.keys():
        known, label = names[column], found[column]
        try:
            place = float(label)
        except (TypeError, ValueError):
            place = -1.0
        if not place.is_integer() or not 0 <= place < len(known):
            raise ValueError(
                f"{column!r} is {label!r}, expected 0 to {len(known) - 1} ({', '.join(known)})"
            )
        found[column] = known[int(place)]
    return found


class _Filling(Formatter):
    """Fills templates with texts and numbers, and with nothing else."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        try:
            value, column = super().get_field(field_name, args, kwargs)
        except (LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"there is no {{{field_name}}}") from error
        if not isinstance(value, str | int | float) or value != value:
            raise ValueError(f"{{{field_name}}} is {value!r}, expected text or a number")
        return value, column
