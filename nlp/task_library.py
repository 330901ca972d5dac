"""A library of tasks: the rows of each as a file of JSON lines, at an address.

It lies where a library of experts may lie (`mole_vl.library`): on disk, in memory, on an object
store or on the Hub. A file that was written never changes.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mole_vl.faults import refuse, some
from mole_vl.library.addresses import open_store
from mole_vl.library.errors import TakenError
from mole_vl.library.library import MARKER as EXPERTS_MARKER, TASKS_MARKER
from mole_vl.library.names import word_fault
from mole_vl.library.seals import sealed, unsealed
from mole_vl.library.stores import Change, Store
from nlp.data import TextRow, parse_rows, to_lines

FORMAT = "mole-vl tasks 1"
_FOLDER, _END = "tasks", ".jsonl"
_TRIES = 5
# The Hub reads the first lines, and warns where there are none.
_HEAD = """---
library_name: mole-vl
---

# Tasks

JSON lines of prompt, answer and task.
"""


class TaskLibrary:
    """Rows by task.

    Args:
        store: Where they lie; `TaskLibrary.open` makes one from an address.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @staticmethod
    def open(
        uri: str | Path,
        token: str | None = None,
        *,
        create: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> "TaskLibrary":
        """Open the library of tasks at an address.

        Args:
            uri: As of `mole_vl.library.ExpertLibrary.open`.
            token: As of `mole_vl.library.ExpertLibrary.open`.
            create: Whether to begin a library where there is none.
            options: As of `mole_vl.library.ExpertLibrary.open`.

        Raises:
            FileNotFoundError: There is no library of tasks, and none is to be begun.
            ValueError: The address is none, or what is there is of another format.
            ModuleNotFoundError: An extra is not installed; the message names it.
        """
        store = open_store(str(uri), token, options)
        if create:
            # Each would write its own list over the other's.
            if store.read([EXPERTS_MARKER], store.mark()):
                raise ValueError(
                    f"{uri}: a library of experts is here, expected a place of the tasks' own: "
                    "take another address"
                )
            store.ensure({TASKS_MARKER: sealed({"format": FORMAT})})
        content = store.read([TASKS_MARKER], store.mark()).get(TASKS_MARKER)
        if content is None:
            raise FileNotFoundError(
                f"{uri}: there is no library of tasks here ({TASKS_MARKER} is missing): make one "
                "with python -m nlp.prepare_tasks, or name each task's file"
            )
        said = unsealed(content, f"{uri}: {TASKS_MARKER}").get("format")
        if said != FORMAT:
            raise ValueError(f"{uri}: {TASKS_MARKER} says {said!r}, expected {FORMAT!r}")
        return TaskLibrary(store)

    @property
    def address(self) -> str:
        """Where it was opened."""
        return self._store.address

    def tasks(self) -> list[str]:
        """The tasks' names, in order."""
        found = self._store.find(_FOLDER, self._store.mark())
        return sorted(
            path.removeprefix(f"{_FOLDER}/").removesuffix(_END)
            for path in found
            if path.endswith(_END)
        )

    def rows(self, task: str) -> list[TextRow]:
        """The rows of a task.

        Raises:
            ValueError: There is no such task, or its file holds something else than rows.
        """
        content = self._store.read([_path(task)], self._store.mark()).get(_path(task))
        if content is None:
            raise ValueError(
                f"{self.address} has no task {task!r}; it has {some(self.tasks()) or 'none'}"
            )
        where = f"{self.address}: {_path(task)}"
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is no UTF-8 text") from error
        return parse_rows(text, where)

    def add(self, tasks: Mapping[str, Sequence[TextRow]]) -> list[str]:
        """Write tasks that are not there yet; those that are there with the same rows stay.

        Returns:
            The tasks that were written.

        Raises:
            ValueError: A name that would not do as a file's in every store, a task without rows, or
                one that is there with other rows. Nothing was written then.
        """
        refuse(
            self.address,
            [
                *(word_fault("task", task) for task in tasks),
                *(f"no rows of {task!r}" for task, rows in tasks.items() if not rows),
            ],
        )
        wanted = {_path(task): to_lines(rows).encode() for task, rows in tasks.items()}
        for _ in range(_TRIES):
            mark = self._store.mark()
            there = self._store.read(wanted, mark)
            self._check_same(wanted, there)
            created = {path: content for path, content in wanted.items() if path not in there}
            if not created:
                return []
            names = sorted({*self.tasks(), *tasks})
            change = Change(
                message=f"tasks {some(tasks)}", staged=(), created=created, readme=_readme(names)
            )
            # Another writer was quicker: what it wrote is looked at, and may be the same.
            with suppress(TakenError):
                self._store.commit(change, mark)
                return [task for task in tasks if _path(task) in created]
        raise ValueError(f"{self.address}: other writers were quicker {_TRIES} times; try again")

    def _check_same(self, wanted: Mapping[str, bytes], there: Mapping[str, bytes]) -> None:
        clashes = [path for path, content in there.items() if content != wanted[path]]
        if clashes:
            raise ValueError(
                f"{self.address} has other rows under {some(clashes)}, and a library's rows stay "
                "as they are, so that what was trained on them can be told: take another address"
            )


def _path(task: str) -> str:
    return f"{_FOLDER}/{task}{_END}"


def _readme(tasks: Sequence[str]) -> bytes:
    listed = "".join(f"- `{_path(task)}`\n" for task in tasks)
    return f"{_HEAD}\n{listed}".encode()
