"""Picks one task's rows for the YAMLs beside it."""

from datasets import Dataset


def _of(rows: Dataset, task: str) -> Dataset:
    return rows.select([place for place, own in enumerate(rows["task"]) if own == task])


def isa(rows: Dataset) -> Dataset:
    """Is-a questions."""
    return _of(rows, "isa")


def continent(rows: Dataset) -> Dataset:
    """Countries and their continents."""
    return _of(rows, "continent")


def plural(rows: Dataset) -> Dataset:
    """Nouns and their plurals."""
    return _of(rows, "plural")
