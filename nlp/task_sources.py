"""Rows by task, wherever they come from: a library of tasks, or a source for each task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mole_vl.faults import refuse
from nlp.data import TextRow
from nlp.dataset import RowSource, rows_of
from nlp.task_library import TaskLibrary


class Tasks(Protocol):
    """Rows by task."""

    @property
    def names(self) -> Sequence[str]:
        """The tasks."""
        ...

    def rows(self, task: str) -> Sequence[TextRow]:
        """The rows of one of them."""
        ...


class _Kept(Tasks):
    def __init__(self, library: TaskLibrary) -> None:
        self._library = library
        self._names = library.tasks()

    @property
    def names(self) -> Sequence[str]:
        return self._names

    def rows(self, task: str) -> Sequence[TextRow]:
        return self._library.rows(task)


class _Named(Tasks):
    def __init__(self, setting: str, sources: Mapping[str, RowSource]) -> None:
        self._setting, self._sources = setting, sources

    @property
    def names(self) -> Sequence[str]:
        return list(self._sources)

    def rows(self, task: str) -> Sequence[TextRow]:
        return rows_of(f"{self._setting}: rows of {task}", self._sources[task])


def open_tasks(setting: str, data: str | Mapping[str, RowSource]) -> Tasks:
    """The tasks of a library at an address, or those that have a source each.

    Raises:
        FileNotFoundError: There is no library of tasks there.
        ValueError: It is none, or has no tasks.
    """
    if not isinstance(data, str):
        return _Named(setting, data)
    if Path(data).is_file():
        raise ValueError(
            f"{setting}: {data} is a file, expected a library of tasks, or files by task such as "
            f"{{TASK: {data}}}"
        )
    library = TaskLibrary.open(data)
    found = _Kept(library)
    refuse(setting, [None if found.names else f"{data} has no tasks yet"])
    return found


def listed(words: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word for part in words.split(",") if (word := part.strip()))
