"""One base, the shelf's experts, tasks of few examples: what every arm of `fewshot.py` is given."""

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mole_vl import Expert, Mixture, mix, read_peft
from mole_vl.domain import gate_parameters
from mole_vl.gates import GateSpec
from mole_vl.sites import SiteKind
from mole_vl.specs import to_data
from mole_vl.training import FitConfig, fit
from nlp.adapter import blocks, bound
from nlp.answers import exact_match, log_likelihood
from nlp.around import Around, alone
from nlp.conditioning import sentence
from nlp.data import EncodedRow, TextRow, read_rows
from nlp.forms import form_of
from nlp.models import load_base
from nlp.task import LanguageTask
from nlp.world.tasks import SHELF
from results import ROOT

WORLD = ROOT / "worlds/text"
ROWS = 16
"""Examples of a step."""


@dataclass(frozen=True)
class Lesson:
    """Some examples of a task, and the rows that are asked afterwards."""

    task: str
    few: Sequence[TextRow]
    asked: Sequence[TextRow]


def lesson_of(task: str, shots: int, draw: int, asked: int | None = None) -> Lesson:
    """Draw examples of a task; few ones are the first of many."""
    folder = WORLD / "data/few"
    pool = read_rows(folder / f"{task}_few.jsonl")
    drawn = random.Random(f"{task} {draw}").sample(pool, len(pool))[:shots]
    return Lesson(task, drawn, read_rows(folder / f"{task}_test.jsonl")[:asked])


class Bench:
    """The base with what is asked of it.

    Args:
        out: Folder for runs in progress.
        experts: The experts; those of the text world's shelf if not given.
    """

    def __init__(self, out: Path, experts: Sequence[Expert] | None = None) -> None:
        self.out = out
        self.model, self.tokenizer = load_base()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)  # pyright: ignore[reportArgumentType] (decorated by transformers)
        shelf = (
            [read_peft(WORLD / "experts" / s.name) for s in SHELF] if experts is None else experts
        )
        self._experts = {expert.name: expert for expert in shelf}

    def experts(self, task: str) -> list[Expert]:
        """The shelf, without the expert of a development task itself."""
        return [expert for name, expert in self._experts.items() if name != task]

    def encoded(self, rows: Sequence[TextRow]) -> list[EncodedRow]:
        """Rows as the model reads them."""
        return form_of(self.model).encode_rows(rows, self.tokenizer)

    def judge(
        self, rows: Sequence[TextRow], *, model: Any = None, around: Around = alone
    ) -> dict[str, Any]:
        """Exact match (a 0 or 1) and log-likelihood per answer token of each row.

        Beside them, the seconds of generating the answers.
        """
        asked, model = self.encoded(rows), model or self.model
        start = time.perf_counter()
        with torch.no_grad():
            hits = exact_match(model, self.tokenizer, asked, batch_rows=50, around=around)
            seconds = time.perf_counter() - start
            told = log_likelihood(model, self.tokenizer, asked, batch_rows=50, around=around)
        return {
            "hits": [int(hit) for hit in hits],
            "told": [round(value, 4) for value in told],
            "asking": seconds,
        }

    def mixed(
        self,
        task: str,
        gate: GateSpec,
        site: SiteKind = "network",
        after: int = 0,
        encoder: str | None = None,
    ) -> Mixture:
        """The base mixed with the shelf, its gate told of an encoder's view of each prompt.

        `unmix` it when done.
        """
        return mix(
            self.model,
            self.experts(task),
            gate=gate,
            site=site,
            after=after,
            blocks=blocks(self.model),
            features=sentence(encoder, self.model, self.tokenizer),
        )

    def language(self, mixture: Mixture, rows: Sequence[TextRow]) -> LanguageTask:
        """The task of teaching the gates some rows."""
        return LanguageTask(
            self.model,
            self.encoded(rows),
            pad=self.tokenizer.pad_token_id,
            parameters=gate_parameters({"model": mixture}),
            around=bound(mixture),
        )

    def taught(self, task: LanguageTask, *, steps: int, lr: float) -> float:
        """Train what a task trains; the seconds that it took."""
        run = self.out / f"run {time.time_ns()}"
        config = FitConfig(
            output=run,
            steps=steps,
            rows=ROWS,
            lr=lr,
            save_every=steps,
            log_every=steps,
            progress=False,
        )
        start = time.perf_counter()
        fit(task, config)
        seconds = time.perf_counter() - start
        shutil.rmtree(run)
        return seconds


Arm = Callable[[Bench, Lesson], dict[str, Any]]


@dataclass(frozen=True)
class Gates:
    """An arm whose gates learn from the examples: their kind, and how they are trained."""

    gate: GateSpec
    site: SiteKind
    lr: float
    after: int = 0
    steps: int = 40

    def settings(self) -> dict[str, Any]:
        """How the arm is made, as data."""
        rest = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "gate"}
        return {"gate": to_data(self.gate), **rest}

    def __call__(self, bench: Bench, lesson: Lesson) -> dict[str, Any]:
        """Train on the examples, then ask."""
        mixture = bench.mixed(lesson.task, self.gate, self.site, self.after)
        seconds = bench.taught(bench.language(mixture, lesson.few), steps=self.steps, lr=self.lr)
        found = bench.judge(lesson.asked, around=bound(mixture)) | {"seconds": seconds}
        mixture.unmix()
        return found


def asked_within(gate: GateSpec, site: SiteKind = "network") -> Arm:
    """An arm whose gates learn nothing."""

    def arm(bench: Bench, lesson: Lesson) -> dict[str, Any]:
        mixture = bench.mixed(lesson.task, gate, site)
        found = bench.judge(lesson.asked, around=bound(mixture))
        mixture.unmix()
        return found

    return arm


def share(found: Mapping[str, Any]) -> float:
    """Exact match of one cell."""
    return sum(found["hits"]) / len(found["hits"])
