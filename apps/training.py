"""Gates trained from the page, by the task and the loop of `train_gates.py`."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from apps.album import ORDINARY_PICTURES, Album
from apps.preset import Preset
from apps.session import Session
from apps.shelf import Lora
from apps.stopping import Turn
from dreambooth.grid import to_image
from dreambooth.subject_style import SubjectStyle
from mole_vl import save_gates
from mole_vl.domain import prepare
from mole_vl.faults import between, refuse
from mole_vl.training import Progress, Stop, fit

SAMPLES = 4
_MAX_LETTERS = 1000


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a person asks gates to learn.

    Args:
        prompt: With the LoRAs' trigger words.
        caption: The same in words that CLIP knows.
        negative: Negative prompt.
        steps: Optimiser steps.
        rows: Pictures of a step.
        rate: Peak learning rate.
        seed: Of everything random.
        every: Steps between sample pictures.
    """

    prompt: str
    caption: str
    negative: str = ""
    steps: int = 60
    rows: int = 4
    rate: float = 0.1
    seed: int = 0
    every: int = 10

    def __post_init__(self) -> None:
        long = max(map(len, (self.prompt, self.caption, self.negative))) > _MAX_LETTERS
        refuse(
            "training",
            [
                None if self.prompt.strip() else "the prompt is empty, expected some words",
                None
                if self.caption.strip()
                else "the caption is empty, expected what the picture shows, in plain words",
                f"a prompt or the caption is longer than {_MAX_LETTERS} letters" if long else None,
                between("steps", self.steps, 1, 2000),
                between("rows", self.rows, 1, 32),
                between("rate", self.rate, 1e-6, 10),
                between("seed", self.seed, 0, 2**32 - 1),
                between("every", self.every, 1, 2000),
            ],
        )


State = Literal["waiting", "preparing", "training", "stopped", "done"]


@dataclass(frozen=True)
class Point:
    """How far a training is.

    Args:
        state: Whether it waits for its turn, loads, trains, was stopped, or is done.
        step: Steps done.
        terms: The last step's terms of the loss.
        samples: Sample pictures' files, when there are new ones.
        gates: The folder of the gate files, at the end.
    """

    state: State
    step: int
    terms: Mapping[str, float]
    samples: Sequence[Path] = ()
    gates: Path | None = None


class Trainer:
    """Trains gates for one person at a time, over a base of its own: drawings go on meanwhile.

    Args:
        base: A folder, or a Hub id.
        preset: Gate, loss, judge and loop.
        album: Pictures that are there without an upload.
    """

    def __init__(self, base: str, preset: Preset, album: Album) -> None:
        self._base = base
        self.preset = preset
        self.album = album
        self._turn = Turn()

    def lacking(self, session: Session, names: Sequence[str]) -> list[str]:
        """What has no pictures yet: LoRAs' names, and the ordinary pictures."""
        return [
            name
            for name in (*names, ORDINARY_PICTURES)
            if name not in session.pictures and name not in self.album
        ]

    def train(
        self,
        session: Session,
        loras: Sequence[Lora],
        lesson: Lesson,
        report: Callable[[Point], None],
    ) -> None:
        """Train gates and keep them for the session's drawings.

        Stopped and asked for the same again, it goes on where it was.

        Args:
            session: Where files go; its switch ends the training after a step, gates kept.
            loras: What is mixed.
            lesson: What is to be learned.
            report: Told after every step.

        Raises:
            Stopped: The switch said so before the first step.
            ValueError: LoRAs, pictures or settings that do not fit.
        """
        names = [lora.name for lora in loras]
        lacking = self.lacking(session, names) if loras else []
        refuse(
            "training",
            [
                None if len(loras) > 1 else "choose at least two LoRAs: gates weigh one by another",
                f"there are no pictures of {', '.join(lacking)} yet: add some" if lacking else None,
            ],
        )

        def waiting() -> None:
            session.training.check()
            report(Point("waiting", 0, {}))

        self._turn.take(waiting)
        try:
            with session.working():
                report(Point("preparing", 0, {}))
                self._train(session, loras, lesson, report)
        finally:
            self._turn.give_back()

    def _train(
        self,
        session: Session,
        loras: Sequence[Lora],
        lesson: Lesson,
        report: Callable[[Point], None],
    ) -> None:
        domain = self._domain(session, loras, lesson)
        config = replace(
            self.preset.fit,
            output=session.folder / "runs" / _name_of(domain, lesson),
            steps=lesson.steps,
            rows=lesson.rows,
            micro_rows=None,
            lr=lesson.rate,
            seed=lesson.seed,
            warmup=min(self.preset.fit.warmup, lesson.steps),
            trackers=(),
            progress=False,
        )
        how = self.preset
        mixtures, task, settings = prepare(
            domain,
            how.gate,
            config,
            site=how.site,
            after=how.after,
            balance=how.balance,
            centring=how.centring,
        )

        def watch(progress: Progress) -> None:
            due = progress.step % lesson.every == 0 and progress.step < progress.steps
            samples = _samples(domain, session) if due else ()
            report(Point("training", progress.step, progress.terms, samples))
            if not session.training:
                raise Stop

        result = fit(task, config, settings, watch)
        gates = session.new_path("gates")
        for component, mixture in mixtures.items():
            save_gates(mixture, gates / f"{component}.safetensors")
        session.keep_gates(frozenset(lora.name for lora in loras), gates)
        state: State = "done" if result.step == lesson.steps else "stopped"
        report(Point(state, result.step, result.terms, _samples(domain, session), gates))

    def _domain(self, session: Session, loras: Sequence[Lora], lesson: Lesson) -> SubjectStyle:
        def pictures(name: str) -> Path:
            return session.pictures.get(name) or self.album[name]

        directional = self.preset.domain.loss.directional > 0
        return self.preset.domain.but(
            base=self._base,
            experts=[lora.folder for lora in loras],
            prompt=lesson.prompt,
            caption=lesson.caption,
            words={lora.name: lora.words.caption for lora in loras} if directional else None,
            pictures={lora.name: pictures(lora.name) for lora in loras},
            ordinary=pictures(ORDINARY_PICTURES),
            negative=lesson.negative,
            judge=None,
            truth=None,
        )


def one_file(gates: Path) -> Path:
    """The only gate file of a folder; several, one for each network, in a zip."""
    files = sorted(gates.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    return Path(shutil.make_archive(str(gates), "zip", root_dir=gates))


def _samples(domain: SubjectStyle, session: Session) -> list[Path]:
    files = []
    for number, picture in enumerate(domain.draw(SAMPLES)):
        file = session.new_path(f"sample {number + 1}.png")
        file.parent.mkdir(parents=True)
        to_image(picture).save(file)
        files.append(file)
    return files


def _name_of(domain: SubjectStyle, lesson: Lesson) -> str:
    """A run's folder: the same for the same LoRAs, pictures and lesson, whatever the samples."""
    folders = [*domain.expert_folders, *domain.picture_folders.values(), domain.ordinary_folder]
    said = [[str(folder) for folder in folders], asdict(replace(lesson, every=1))]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
