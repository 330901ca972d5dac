"""How good each expert of a library is at each task, by itself; noted in the library."""

from collections.abc import Mapping
from dataclasses import dataclass

from accelerate import PartialState

from mole_vl import mix
from mole_vl.faults import at_least, refuse, some
from mole_vl.gates import Average
from mole_vl.library.transforms import keep_scores
from nlp.adapter import blocks, bound
from nlp.answers import exact_match
from nlp.dataset import RowSource
from nlp.forms import form_of
from nlp.library_transforms import on_another_base
from nlp.shelf import Shelf, ShelfConfig, encoded_by_name, load_shelf_base, open_shelf
from nlp.task_sources import listed, open_tasks

MEASURE = "exact_match"
"""What is measured where prompts stand as they are, over the experts' own base, in all its bits."""


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(ShelfConfig):
    """Ask every expert alone for every task, by exact match; the scores are noted in the library.

    `mole library best` tells them. Those in the chat template, in fewer bits or over another base
    than the experts' own are measures of their own, which is told.

    Args:
        data: Address of a library of tasks (nlp.prepare_tasks); or where each task's rows come
            from, by task: files of JSON lines with prompt, answer and task, or datasets with their
            templates (`nlp.dataset.DatasetRows`). Rows that no expert was trained on are meant.
        tasks: Tasks of `data` with commas between; all of them if not given.
        limit: The first so many rows of each task.
    """

    data: str | Mapping[str, RowSource]
    tasks: str = ""
    limit: int | None = 64

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [
            *super().faults(),
            at_least("limit", self.limit, 1),
            None if self.data else "data is empty, expected an address, or tasks",
        ]


def measure_of(config: ScoresConfig, shelf: Shelf) -> str:
    """What is measured: scores that were asked otherwise are not to be ranked together."""
    style = "" if config.style == "plain" else f"-{config.style}"
    bits = "" if config.quantise is None else f"-{config.quantise}"
    return f"{MEASURE}{style}{bits}{on_another_base(shelf)}"


def scores(config: ScoresConfig) -> dict[str, dict[str, float]]:
    """Exact match in parts of 1, by task, by expert; a task's are noted as soon as it is asked.

    Raises:
        FileNotFoundError: A library or rows that are not there.
        MissingExpertError: There is no expert of a name.
        ValueError: Tasks that there are no rows of, or experts that do not fit the base or that
            were replaced while they were asked.
    """
    shelf, tasks = open_shelf(config), open_tasks("data", config.data)
    asked = listed(config.tasks) or tuple(tasks.names)
    refuse(
        "tasks",
        [
            f"there are no rows of {task!r}; there are {some(tasks.names)}"
            for task in asked
            if task not in tasks.names
        ],
    )
    rows = {task: list(tasks.rows(task))[: config.limit] for task in asked}
    model, tokenizer = load_shelf_base(config, shelf)
    encoded = encoded_by_name(rows, config, model, tokenizer)
    mixture = mix(
        model,
        shelf.experts(),
        gate=Average(),
        site="network",
        blocks=blocks(model),
        calls=form_of(model).calls,
    )
    mixture.model.to(PartialState().device)
    versions = {info.name: info.version for info in shelf.infos}
    measure = measure_of(config, shelf)
    found: dict[str, dict[str, float]] = {}
    for task, own in encoded.items():
        found[task] = {}
        for name in mixture.names:
            with mixture.pinned({name: 1.0}):
                hits = exact_match(
                    model, tokenizer, own, batch_rows=config.batch_rows, around=bound(mixture)
                )
            found[task][name] = sum(hits) / len(hits)
        keep_scores(shelf.library, task, found[task], versions, measure)
        ranked = sorted(found[task].items(), key=lambda one: -one[1])
        print(f"{task}, {len(own)} rows: {', '.join(f'{n} {v:.3f}' for n, v in ranked)}")
    print(f"scores of {', '.join(shelf.names)} are in {shelf.library.address}, as {measure}")
    return found
