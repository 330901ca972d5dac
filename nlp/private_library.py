"""Train a private library: one expert for each task, or for several tasks, from one YAML file.

    accelerate launch --num_processes 1 -m nlp.private_library --config configs/text_library.yaml

Every expert goes into the library as soon as it is trained. A second call trains only those that
are missing; one that was broken off goes on where it was. A task that fails is told at the end, and
the rest go on: the exit code is 1 then.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import PreTrainedModel

from mole_vl import Mixture
from mole_vl.faults import as_messages, differences, some
from mole_vl.files import check_output, digest_contents
from mole_vl.library import ExpertLibrary
from mole_vl.library.messages import faults_of_libraries
from mole_vl.program import command
from mole_vl.specs import to_data
from mole_vl.targets import check_targets
from mole_vl.tenants import save_tenant
from nlp.data import EncodedRow, TextRow, Tokenizer, digest_rows
from nlp.forms import form_of
from nlp.models import load_base
from nlp.private_config import PrivateLibraryConfig, experts_of
from nlp.task_sources import Tasks, open_tasks
from nlp.train_many import taught


class Lesson(NamedTuple):
    """What an expert learns.

    Args:
        tasks: Its tasks.
        rows: Their rows.
        encoded: The same as token ids.
    """

    tasks: tuple[str, ...]
    rows: Sequence[TextRow]
    encoded: Sequence[EncodedRow]


@dataclass(frozen=True)
class Outcome:
    """What became of one expert: trained, there already, or not trained, and why."""

    expert: str
    tasks: tuple[str, ...]
    said: str
    failed: bool = False


class PrivateLibrary:
    """Trains what a library lacks.

    Args:
        config: What is to be trained.
        library: Where it goes.
        tasks: The rows by task.
    """

    def __init__(self, config: PrivateLibraryConfig, library: ExpertLibrary, tasks: Tasks) -> None:
        self._config, self._library, self._tasks = config, library, tasks
        self._outcomes: dict[str, Outcome] = {}

    def train(self, wanted: Mapping[str, tuple[str, ...]]) -> list[Outcome]:
        """Train the experts that are missing; what became of each.

        Args:
            wanted: Each expert's tasks, by its name.
        """
        there = self._library.list()
        missing = {}
        for name, tasks in wanted.items():
            if name in there.experts:
                self._note(name, tasks, self._stands(name, tasks))
            elif name in there.damaged:
                self._note(name, tasks, there.damaged[name], failed=True)
            else:
                missing[name] = tasks
        if missing:
            self._train(missing)
        return [self._outcomes[name] for name in wanted]

    def _train(self, missing: Mapping[str, tuple[str, ...]]) -> None:
        config = self._config
        model, tokenizer = load_base(config.base, quantise=config.quantise)
        if config.lora.targets is not None:
            check_targets(model, "lora", config.lora.targets)
        lessons = {}
        for name, tasks in missing.items():
            try:
                lessons[name] = self._lesson(tasks, model, tokenizer)
            # Whatever is wrong with one task's rows, the others' are to be learned.
            except Exception as error:
                self._note(name, tasks, _said(error), failed=True)
        if config.together and lessons:
            self._attempt(lessons, model, tokenizer)
        else:
            for name, own in lessons.items():
                self._attempt({name: own}, model, tokenizer)

    def _attempt(
        self, lessons: Mapping[str, Lesson], model: PreTrainedModel, tokenizer: Tokenizer
    ) -> None:
        """Teach some experts in one pass; if that breaks off, each that is missing by itself."""
        fault = None
        try:
            self._teach(lessons, model, tokenizer)
        except Exception as error:
            fault = _said(error)
        # Outside of the handler, which would hold what the pass had in memory.
        if fault is None:
            return
        left = {name: own for name, own in lessons.items() if name not in self._outcomes}
        if len(lessons) == 1:
            for name, lesson in left.items():
                self._note(name, lesson.tasks, fault, failed=True)
            return
        print(
            f"in one pass: FAILED: {fault}; {', '.join(left)} are trained one after the other now",
            flush=True,
        )
        for name, lesson in left.items():
            self._attempt({name: lesson}, model, tokenizer)

    def _lesson(
        self, tasks: tuple[str, ...], model: PreTrainedModel, tokenizer: Tokenizer
    ) -> Lesson:
        rows, config = self._rows(tasks), self._config
        encoded = form_of(model).encode_rows(
            rows,
            tokenizer,
            style=config.style,
            context=config.context,
            source=f"rows of {some(tasks)}",
        )
        return Lesson(tasks, rows, encoded)

    def _rows(self, tasks: Sequence[str]) -> list[TextRow]:
        return [row for task in tasks for row in self._tasks.rows(task)]

    def _teach(
        self, lessons: Mapping[str, Lesson], model: PreTrainedModel, tokenizer: Tokenizer
    ) -> None:
        config = self._config
        # The experts of a pass decide its run: another pass, of those that failed, begins anew.
        word = digest_contents(name.encode() for name in lessons)[:12]
        place = f"together/{word}" if config.together else f"alone/{next(iter(lessons))}"
        with taught(
            model,
            dict.fromkeys(lessons, config.lora),
            {name: lesson.encoded for name, lesson in lessons.items()},
            replace(config.fit, output=config.fit.output / place),
            pad=tokenizer.pad_token_id,
            lesson={
                **self._settings(),
                "data": {name: digest_rows(lesson.rows) for name, lesson in lessons.items()},
            },
        ) as (mixture, result):
            for name, lesson in lessons.items():
                try:
                    self._keep(mixture, name, lesson)
                # The others have been learned with it, and are to be kept.
                except Exception as error:
                    self._note(name, lesson.tasks, _said(error), failed=True)
                    continue
                said = f"trained, {result.step} steps, {len(lesson.rows)} rows"
                self._note(name, lesson.tasks, said)

    def _keep(self, mixture: Mixture, name: str, lesson: Lesson) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_tenant(mixture, name, Path(folder) / name, self._config.base)
            self._library.import_peft(
                Path(folder) / name,
                task=",".join(lesson.tasks),
                licence=self._config.licence,
                training={
                    **self._trained_by(lesson.tasks),
                    "data": digest_rows(lesson.rows),
                    "rows": len(lesson.rows),
                },
            )

    def _settings(self) -> dict[str, Any]:
        config = self._config
        return {
            "base": config.base,
            "style": config.style,
            "context": config.context,
            **({"quantise": config.quantise} if config.quantise else {}),
        }

    def _trained_by(self, tasks: Sequence[str]) -> dict[str, Any]:
        """What decides an expert beside its rows, as its library tells it."""
        fit = {**self._config.fit.arithmetic(), "steps": self._config.fit.steps}
        fit["optimizer"] = str(fit["optimizer"])
        return {
            "tasks": list(tasks), **self._settings(), "lora": to_data(self._config.lora), "fit": fit
        }  # fmt: skip

    def _stands(self, name: str, tasks: Sequence[str]) -> str:
        """What is said of an expert that is there; that it was trained otherwise is told too."""
        before = self._library.get(name).info.training
        now = self._trained_by(tasks)
        # Through JSON lists and tuples are alike.
        told = differences({key: _plain(before.get(key)) for key in now},
                           {key: _plain(now[key]) for key in now})  # fmt: skip
        if (rows := before.get("data")) is not None:
            try:
                told += [] if digest_rows(self._rows(tasks)) == rows else ["its rows were others"]
            # Nothing is to be trained on them.
            except Exception as error:
                told.append(f"its rows are not to be read now ({_said(error)})")
        return "is there" + (f", trained otherwise: {'; '.join(told)}" if told else "")

    def _note(self, name: str, tasks: tuple[str, ...], said: str, *, failed: bool = False) -> None:
        self._outcomes[name] = Outcome(name, tasks, said, failed)
        print(f"{name}: {'FAILED: ' if failed else ''}{said}", flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(config: PrivateLibraryConfig) -> list[Outcome]:
    """Train what is missing.

    Raises:
        SystemExit: With code 1: an expert failed, and the rest are in the library.
    """
    check_output("fit.output", config.fit.output)
    if PartialState().num_processes > 1:
        raise ValueError(
            "private_library trains in one process: launch it with --num_processes 1; on several "
            "devices start it once on each, with experts of its own by only"
        )
    tasks = open_tasks("data", config.data)
    wanted = experts_of(config, tasks.names)
    library = ExpertLibrary.open(config.library, create=True)
    outcomes = PrivateLibrary(config, library, tasks).train(wanted)
    failed = [one for one in outcomes if one.failed]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} experts are in {library.address}")
    if failed:
        for one in failed:
            print(f"error: {one.expert}: {one.said}", file=sys.stderr)
        raise SystemExit(1)
    return outcomes


if __name__ == "__main__":
    with as_messages("nlp"), faults_of_libraries():
        main(command(PrivateLibraryConfig, about=__doc__))
