"""The only training loop of the project.

A step: the global batch is `rows` rows, each with randomness of its own; every process takes its
part, in pieces of `micro_rows`; per-unit terms are weighed by the units of the whole global batch;
gradients are summed over pieces and processes; the optimisers step. So one process and two, one
piece and four, an unbroken run and a resumed one take the same steps.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import nn
from tqdm.auto import tqdm

from mole_vl.faults import differences
from mole_vl.files import check_output, new_file
from mole_vl.processes import sum_over_processes
from mole_vl.training.alone import alone_in
from mole_vl.training.config import FitConfig
from mole_vl.training.optimizers import make_optimizers
from mole_vl.training.rows import mix_seed
from mole_vl.training.share import Share
from mole_vl.training.snapshot import Snapshot, read_snapshot, write_snapshot
from mole_vl.training.tally import Values
from mole_vl.training.task import Apart, Part, Task

LOG = "metrics.jsonl"


@dataclass(frozen=True)
class FitResult:
    """How a run ended: steps in all, seconds spent by this call, the last step's terms."""

    step: int
    seconds: float
    terms: Mapping[str, float]


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Args:
        step: Steps done.
        steps: Steps in all.
        terms: The step's terms.
        accelerator: The run's: its processes, its autocast, its trackers.
    """

    step: int
    steps: int
    terms: Mapping[str, float]
    accelerator: Accelerator


Watch = Callable[[Progress], None]


class Stop(Exception):  # noqa: N818 (no error: the way out of a run)
    """Raised by a watch: the run ends after this step, with a checkpoint to go on from."""


class _Run:
    """A run in progress: the trained parameters, their optimiser and averages, and the log."""

    def __init__(self, task: Task, config: FitConfig, settings: Mapping[str, object]) -> None:
        self.task = task
        self.config = config
        self.accelerator = Accelerator(
            log_with=list(config.trackers) or None, project_dir=str(config.output)
        )
        self.output = Path(config.output)
        task.place(self.accelerator.device)
        self.parameters = dict(task.parameters())
        if not self.parameters:
            raise ValueError("fit: the task has no parameters to train")
        self.parts = task.apart() if isinstance(task, Apart) else [Part(list(self.parameters))]
        optimizers = make_optimizers(
            config.optimizer,
            self.parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            rates={name: part.rate for part in self.parts for name in part.names},
        )
        self.optimizers = {k: self.accelerator.prepare(one) for k, one in optimizers.items()}
        self.averages = (
            {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema else {}
        )
        self.step = 0
        self.log_file = self.output / LOG
        precision = {"mixed_precision": self.accelerator.mixed_precision}
        # As JSON would give them back: what is compared with a snapshot must look alike.
        self.settings: dict[str, object] = json.loads(
            json.dumps({**config.arithmetic(), **precision, **settings}, default=str)
        )
        self.share = Share(self.accelerator, config.rows, config.micro_rows)

    def resume(self) -> None:
        """Take up the run found in the output folder, if there is one."""
        with self.accelerator.main_process_first():
            snapshot = read_snapshot(self.output)
        if snapshot is not None:
            self._take_up(snapshot)
        if self.accelerator.is_main_process:
            self._trim_log()
        # One start for all processes, whatever each one drew.
        for tensor in (*self.parameters.values(), *self.averages.values()):
            broadcast(tensor.detach())

    def _take_up(self, snapshot: Snapshot) -> None:
        faults = differences(snapshot.settings, self.settings)
        if set(snapshot.weights) != set(self.parameters):
            odd = sorted(set(snapshot.weights) ^ set(self.parameters))
            faults.append(f"other parameters are trained: {', '.join(odd[:5])}")
        if faults:
            raise ValueError(
                f"fit: the run in {self.output} was made with other settings "
                f"({'; '.join(faults)}); take another output folder, or remove this one"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(snapshot.weights[name])
                if self.averages:
                    self.averages[name].copy_(snapshot.averages[name])
        for rule, optimizer in self.optimizers.items():
            optimizer.load_state_dict(snapshot.optimizer[rule])
        if self.accelerator.scaler is not None and snapshot.scaler:
            self.accelerator.scaler.load_state_dict(dict(snapshot.scaler))
        self.step = snapshot.step

    def _trim_log(self) -> None:
        """Drop what a broken-off run logged after its last snapshot, a torn last line too."""
        if not self.log_file.exists():
            return
        kept = []
        for line in self.log_file.read_text(errors="replace").splitlines():
            try:
                step = json.loads(line)["step"]
            except (ValueError, LookupError, TypeError):
                break
            if step <= self.step:
                kept.append(line + "\n")
        with new_file(self.log_file) as partial:
            partial.write_text("".join(kept))

    def save(self) -> None:
        """Write a snapshot, once for all processes."""
        if self.accelerator.is_main_process:
            weights = {name: p.detach().cpu() for name, p in self.parameters.items()}
            averages = {name: p.cpu() for name, p in self.averages.items()}
            scaler = self.accelerator.scaler
            snapshot = Snapshot(
                self.step,
                self.settings,
                weights,
                averages,
                {rule: optimizer.state_dict() for rule, optimizer in self.optimizers.items()},
                scaler.state_dict() if scaler is not None else {},
            )
            write_snapshot(self.output, snapshot)
        self.accelerator.wait_for_everyone()

    def advance(self) -> Values:
        """One optimiser step; returns the terms' values over the global batch."""
        config, accelerator = self.config, self.accelerator
        # Whatever draws from the global generators (a dropout) draws the same after a resume.
        set_seed(mix_seed(config.seed, self.step, accelerator.process_index) % 2**32)
        pieces = self.share.pieces(self.task, config.seed, self.step)
        tally = pieces.tally()
        for batch, units in pieces:
            with accelerator.autocast():
                terms = self.task.losses(batch)
            loss = tally.add(terms, units)
            if loss.requires_grad:
                accelerator.backward(loss)
        found = tally.values()
        for name, value in found.terms.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"fit: the term {name!r} is {value} at step {self.step}; the last checkpoint "
                    "is untouched. Lower the learning rate or look at this batch's data"
                )
        self._reduce_gradients()
        limit = math.inf if config.clip is None else config.clip
        norms = [
            accelerator.clip_grad_norm_([self.parameters[name] for name in part.names], limit)
            for part in self.parts
        ]
        finite = all(norm is None or bool(torch.isfinite(norm)) for norm in norms)
        # In fp16 the scaler looks for overflow itself, and skips the step.
        if accelerator.scaler is None and not finite:
            raise FloatingPointError(
                f"fit: the gradient is no finite number at step {self.step}; the last checkpoint "
                "is untouched. Look for a square root or a division by zero in the loss"
            )
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = config.rate(self.step) * group.get("rate", 1.0)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._average()
        return found

    def _reduce_gradients(self) -> None:
        parameters: list[nn.Parameter] = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        total = sum_over_processes(torch.cat([grad.flatten().float() for grad in grads]))
        for grad, piece in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            grad.copy_(piece.view_as(grad))

    @torch.no_grad()
    def _average(self) -> None:
        # The average trusts a young run less (the usual warm-up of an EMA).
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for name, average in self.averages.items():
            average.lerp_(self.parameters[name].to(average.dtype), 1 - decay)

    def log(self, found: Values) -> None:
        """One line of the log, and the trackers."""
        values = {**found.terms, **found.measures}
        line = {"step": self.step, "lr": self.config.rate(self.step - 1), **values}
        if self.accelerator.is_main_process:
            with self.log_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.config.trackers:
            self.accelerator.log(values, step=self.step)

    def start_trackers(self) -> None:
        """Tell the trackers the settings, as plain values, which are all that they take."""
        if self.config.trackers:
            known = {
                name: v if isinstance(v, int | float) else str(v)
                for name, v in self.settings.items()
            }
            self.accelerator.init_trackers(
                self.config.project,
                config=known,
                init_kwargs={name: dict(given) for name, given in self.config.tracking.items()},
            )

    def finish(self) -> None:
        """Close the trackers; the parameters take their averages."""
        if self.config.trackers:
            # Not `end_training`, which would end the process group as well: another fit may follow.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        with torch.no_grad():
            for name, average in self.averages.items():
                self.parameters[name].copy_(average)


def _stopped(watch: Watch, progress: Progress) -> bool:
    """Whether a watch has had enough, in any of the processes: all of them end at one step."""
    try:
        watch(progress)
        stop = 0.0
    except Stop:
        stop = 1.0
    return bool(sum_over_processes(torch.tensor(stop, device=progress.accelerator.device)))


def fit(
    task: Task,
    config: FitConfig,
    settings: Mapping[str, object] | None = None,
    watch: Watch | None = None,
) -> FitResult:
    """Train `task` to the end of `config`, from the start or from where the output folder stands.

    Args:
        task: Parameters, batches and loss of a domain.
        config: Steps, batch, optimiser, output.
        settings: What else decides the weights (ranks, data, gates), as plain data: a run found in
            the output folder is continued only where it agrees.
        watch: Called after every step in every process; may draw samples, and may raise `Stop`.
            What it does must leave the task's parameters alone.

    Returns:
        The run's end. The task's parameters hold the trained weights (their average with `ema`).

    Raises:
        ValueError: The settings contradict the processes, or the run found in the output folder;
            that folder cannot be written, or another run is at work in it.
        FloatingPointError: A term of the loss is no finite number.
    """
    check_output("fit", Path(config.output))
    run = _Run(task, config, settings or {})
    run.output.mkdir(parents=True, exist_ok=True)
    with alone_in(run.output, run.accelerator.is_main_process):
        run.resume()
        run.start_trackers()
        return _loop(run, watch)


def _loop(run: _Run, watch: Watch | None) -> FitResult:
    config, start = run.config, time.monotonic()
    terms: Mapping[str, float] = {}
    bar = tqdm(
        total=config.steps,
        initial=run.step,
        desc=run.output.name,
        disable=not (config.progress and run.accelerator.is_main_process),
    )
    with bar:
        while run.step < config.steps:
            found = run.advance()
            terms = found.terms
            bar.update()
            if run.step % config.log_every == 0 or run.step == config.steps:
                run.log(found)
                bar.set_postfix({name: f"{value:.4f}" for name, value in terms.items()})
            if run.step % config.save_every == 0 or run.step == config.steps:
                run.save()
            if watch and _stopped(watch, Progress(run.step, config.steps, terms, run.accelerator)):
                run.save()
                break
    run.finish()
    return FitResult(run.step, time.monotonic() - start, terms)
