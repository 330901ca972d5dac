"""Measure a library of experts over its base, under a route, task by task."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mole_vl import Mixture
from mole_vl.faults import at_least, refuse
from mole_vl.files import check_output_file, new_file
from mole_vl.specs import to_data
from nlp.answers import exact_match
from nlp.dataset import RowSource
from nlp.harness_run import Harness
from nlp.routes import RouteConfig, routed
from nlp.shelf import Shelf, encoded_by_name, load_shelf_base, open_shelf
from nlp.task_sources import Tasks, listed, open_tasks


@dataclass(frozen=True, kw_only=True)
class EvaluateLibraryConfig(RouteConfig):
    """Measure a library's experts on tasks: exact match of answers, or lm-eval's own measures.

    Args:
        tasks: Tasks with commas between: those of `data`, by exact match; others are lm-eval's, by
            their names, or YAML files and folders of them. All of `data` if not given.
        data: Address of a library of tasks (nlp.prepare_tasks); or where each task's rows come
            from, by task: files of JSON lines with prompt, answer and task, or datasets with their
            templates (`nlp.dataset.DatasetRows`).
        output: A file for the results, JSON.
        limit: The first so many questions of each task; all of them if not given.
        num_fewshot: For lm-eval, worked examples before each question; each task's own number if
            not given.
    """

    tasks: str = ""
    data: str | Mapping[str, RowSource] | None = None
    output: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [
            *super().faults(),
            at_least("limit", self.limit, 1),
            at_least("num_fewshot", self.num_fewshot, 0),
            "data is empty, expected an address, or tasks"
            if self.data is not None and not self.data
            else None,
            "neither tasks nor data are given"
            if not listed(self.tasks) and self.data is None
            else None,
        ]


@dataclass(frozen=True)
class TaskScore:
    """Exact match on one task's rows, in parts of 1."""

    task: str
    rows: int
    exact_match: float


def evaluate_library(config: EvaluateLibraryConfig) -> dict[str, Any]:
    """Measure, print, and write what was measured.

    Raises:
        FileNotFoundError: A library, rows or a classifier that is not there.
        MissingExpertError: There is no expert of a name.
        ValueError: Tasks that nobody knows, experts that do not fit the base; as of
            `nlp.routes.routed`.
    """
    if config.output is not None:
        check_output_file("output", config.output)
    shelf = open_shelf(config)
    tasks = None if config.data is None else open_tasks("data", config.data)
    own, others = _divided(config, tasks)
    rows = {task: list(tasks.rows(task))[: config.limit] for task in own} if tasks else {}
    harness, loaded = _asked_of_harness(others, tasks)
    model, tokenizer = load_shelf_base(config, shelf)
    encoded = encoded_by_name(rows, config, model, tokenizer)
    mixture, around = routed(model, tokenizer, shelf, config)
    base: Any = model
    base.to(PartialState().device)
    scores = []
    for task, asked in encoded.items():
        hits = exact_match(model, tokenizer, asked, batch_rows=config.batch_rows, around=around)
        scores.append(TaskScore(task, len(asked), sum(hits) / len(asked)))
    found: dict[str, Any] = {"measured": _measured(config, shelf, mixture)}
    if scores:
        found["exact_match"] = {s.task: {"rows": s.rows, "score": s.exact_match} for s in scores}
        print(table(scores, config.route))
    text = ""
    if harness:
        found["lm_eval"] = harness.measure(
            model,
            tokenizer,
            loaded,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            batch_rows=config.batch_rows,
            style=config.style,
            around=around,
        )
        print(harness.table(found["lm_eval"]))
        text = harness.to_json(found)
    if config.output is not None:
        with new_file(config.output) as partial:
            said = text or json.dumps(found, indent=2, ensure_ascii=False)
            partial.write_text(said, encoding="utf-8")
        print(f"results in {config.output}")
    return found


def _divided(config: EvaluateLibraryConfig, tasks: Tasks | None) -> tuple[list[str], list[str]]:
    """The tasks that there are rows of, and those that lm-eval is asked for."""
    known = tasks.names if tasks else ()
    asked = listed(config.tasks) or tuple(known)
    others = [task for task in asked if task not in known]
    refuse(
        "evaluate",
        [
            "num_fewshot is for lm-eval, and all tasks are of data"
            if config.num_fewshot is not None and not others
            else None
        ],
    )
    return [task for task in asked if task in known], others


def _asked_of_harness(
    asked: Sequence[str], tasks: Tasks | None
) -> tuple[Harness | None, list[Any]]:
    """lm-eval, if it is asked for anything, and what it is asked for."""
    if not asked:
        return None, []
    try:
        harness = Harness()
        return harness, harness.load(asked)
    except (ValueError, FileNotFoundError) as error:
        if tasks is None:
            raise
        # A task of the data that was mistyped is none of lm-eval's either.
        raise ValueError(f"{error}; the tasks of data are {', '.join(tasks.names)}") from error


def _measured(config: EvaluateLibraryConfig, shelf: Shelf, mixture: Mixture) -> dict[str, Any]:
    """What was measured: the experts by their hashes, and how they were routed among."""
    return {
        "library": shelf.library.address,
        "base": shelf.base,
        "quantise": config.quantise,
        "style": config.style,
        "experts": {info.name: info.digest for info in shelf.infos},
        "route": config.route,
        "top_k": config.top_k,
        "classifier": None if config.classifier is None else str(config.classifier),
        "gate": to_data(mixture.spec),
        "site": mixture.layout.kind,
    }


def table(scores: Sequence[TaskScore], route: str) -> str:
    """Exact match by task, and its mean over tasks, in Markdown."""
    lines = [f"| task | rows | {route} |", "|---|---|---|"]
    lines += [f"| {s.task} | {s.rows} | {s.exact_match:.3f} |" for s in scores]
    mean = sum(s.exact_match for s in scores) / len(scores)
    return "\n".join([*lines, f"| mean | {sum(s.rows for s in scores)} | {mean:.3f} |"])
