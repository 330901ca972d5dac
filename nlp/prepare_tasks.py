"""Turn a dataset into a library of tasks: one file of JSON lines for each task, at an address.

    python -m nlp.prepare_tasks --config configs/flan_tasks.yaml
    python -m nlp.prepare_tasks --dataset questions.csv --prompt "{question}" --answer "{said}" \
        --task "{kind}" --library local://out/tasks

Of a task with more rows than `max_rows` so many are drawn, and how many are left out is told.
Called again it writes what is missing: the same settings draw the same rows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import numpy as np

from mole_vl.faults import as_messages, at_least, refuse, some, told
from mole_vl.library.messages import faults_of_libraries
from mole_vl.library.names import word_fault
from mole_vl.program import command
from nlp.dataset import DatasetRows, open_table
from nlp.task_library import TaskLibrary
from nlp.task_sources import listed

# Rows that are written in one change: on the Hub a change is a commit.
_AT_ONCE = 100_000


@dataclass(frozen=True, kw_only=True)
class PrepareTasksConfig(DatasetRows):
    """A dataset of many tasks, and where its rows go.

    Args:
        library: Address of the library of tasks; one is begun where there is none.
        max_rows: The most rows of a task.
        seed: Of the rows that are drawn where there are more.
        tasks: Tasks with commas between; all of them if not given.
        underscores: Whether all but letters and digits of tasks' names becomes `_`, as MTTL calls
            FLAN's: ai2_arc/ARC-Easy:1.0.0 is ai2_arc_ARC_Easy_1_0_0 then.
    """

    library: str
    max_rows: int = 10_000
    seed: int = 0
    tasks: str = ""
    underscores: bool = False

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [
            *super().faults(),
            None if self.library else "library is empty, expected an address",
            at_least("max_rows", self.max_rows, 1),
            at_least("seed", self.seed, 0),
        ]


class Prepared(NamedTuple):
    """What became of a task.

    Args:
        task: Its name.
        rows: How many rows of it are in the library.
        left_out: How many more there are in the dataset.
        new: Whether they were written now.
    """

    task: str
    rows: int
    left_out: int
    new: bool


def drawn(task: str, places: Sequence[int], most: int, seed: int) -> list[int]:
    """So many of a task's places, in order; other tasks have no part in the draw."""
    if len(places) <= most:
        return list(places)
    chance = np.random.default_rng([seed, crc32(task.encode())])
    chosen = chance.choice(len(places), most, replace=False)
    return [places[place] for place in np.sort(chosen).tolist()]


def places_by_task(config: PrepareTasksConfig, said: Sequence[str]) -> dict[str, list[int]]:
    """Where each task's rows are, by its name in the library.

    Args:
        config: Which tasks are meant, and how they are called.
        said: Each row's task.

    Raises:
        ValueError: Names that would not do in every store, two tasks of one name, or tasks that are
            asked for and have no rows.
    """
    found: dict[str, list[int]] = {}
    called: dict[str, set[str]] = {}
    for place, name in enumerate(said):
        task = re.sub(r"[^A-Za-z0-9]", "_", name) if config.underscores else name
        found.setdefault(task, []).append(place)
        called.setdefault(task, set()).add(name)
    asked = listed(config.tasks)
    wanted = {task: own for task, own in found.items() if not asked or task in asked}
    refuse(
        f"tasks of {config}",
        told(
            [
                *(f"there is no task {task!r}; there are {some(sorted(found))}"
                  for task in asked if task not in found),
                *(f"{fault} (or underscores true)" for task in wanted
                  if (fault := word_fault("task", task))),
                *(f"{' and '.join(sorted(called[task]))} are both called {task!r}"
                  for task in wanted if len(called[task]) > 1),
            ]
        ),
    )  # fmt: skip
    return dict(sorted(wanted.items()))


def main(config: PrepareTasksConfig) -> list[Prepared]:
    """Write the tasks that are missing, and tell what was left out.

    Raises:
        FileNotFoundError: There is no such dataset.
        ValueError: Columns that are missing, rows without a text, names that no store takes, or
            other rows of a task in the library.
    """
    table = open_table("dataset", config)
    places = places_by_task(config, table.tasks())
    library = TaskLibrary.open(config.library, create=True)
    outcomes: list[Prepared] = []
    for group in _groups(places, config.max_rows):
        chosen = {t: drawn(t, places[t], config.max_rows, config.seed) for t in group}
        rows = {task: table.rows(own) for task, own in chosen.items()}
        new = library.add(rows)
        for task, own in rows.items():
            left_out = len(places[task]) - len(own)
            outcomes.append(Prepared(task, len(own), left_out, task in new))
            more = f", {left_out} left out (more than {config.max_rows})" if left_out else ""
            print(f"{task}: {'' if task in new else 'is there, '}{len(own)} rows{more}")
    rows_in_all, left_out = sum(o.rows for o in outcomes), sum(o.left_out for o in outcomes)
    print(
        f"{len(outcomes)} tasks with {rows_in_all} rows are in {library.address}; "
        f"{left_out} rows left out"
    )
    return outcomes


def _groups(places: Mapping[str, Sequence[int]], most: int) -> list[list[str]]:
    """Tasks whose rows are written together."""
    groups: list[list[str]] = [[]]
    size = 0
    for task, own in places.items():
        count = min(len(own), most)
        if groups[-1] and size + count > _AT_ONCE:
            groups.append([])
            size = 0
        groups[-1].append(task)
        size += count
    return groups


if __name__ == "__main__":
    with as_messages("nlp"), faults_of_libraries():
        main(command(PrepareTasksConfig, about=__doc__))
