"""How `fit` trains."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from mole_vl.faults import at_least, between, one_of, positive, refuse, share
from mole_vl.training.optimizers import Rule, lacking

_TRACKERS = [kind.value for kind in LoggerType]
_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of the training loop. Precision and processes are `accelerate launch`'s.

    Args:
        output: Folder for checkpoints and `metrics.jsonl`; a run found there is resumed.
        steps: Optimiser steps in all.
        rows: Rows of the global batch, over all processes.
        micro_rows: Rows that one process holds at once; None for its whole part of the batch.
        optimizer: adamw; adamw8bit, whose averages take 8 bits (needs bitsandbytes); or muon for
            matrices beside adamw, which learns networks from scratch in far fewer steps.
        lr: Peak learning rate.
        schedule: Course of the rate after the warm-up: constant, or to zero by a line or a cosine.
        warmup: Steps over which the rate rises from zero.
        weight_decay: Decoupled decay.
        clip: Largest norm of the whole gradient; None for no limit.
        ema: Decay of an average of the weights that is what remains at the end; 0 for none.
        seed: Seed of everything random.
        save_every: Steps between checkpoints.
        log_every: Steps between lines of the log.
        trackers: Trackers of accelerate by name, such as tensorboard or wandb.
        project: The project that trackers file the run under.
        tracking: What else a tracker is started with, by the tracker's name: for wandb, the
            arguments of `wandb.init`.
        progress: Whether a progress bar is shown.
    """

    output: Path
    steps: int
    rows: int = 16
    micro_rows: int | None = None
    optimizer: Rule = "adamw"
    lr: float = 3e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float = 0.0
    seed: int = 0
    save_every: int = 100
    log_every: int = 10
    trackers: tuple[str, ...] = ()
    project: str = "mole-vl"
    tracking: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    progress: bool = True

    def __post_init__(self) -> None:
        refuse(
            "FitConfig",
            [
                at_least("steps", self.steps, 1),
                at_least("rows", self.rows, 1),
                at_least("micro_rows", self.micro_rows, 1),
                one_of("optimizer", self.optimizer, get_args(Rule)),
                lacking(self.optimizer),
                positive("lr", self.lr),
                one_of("schedule", self.schedule, _SCHEDULES),
                between("warmup", self.warmup, 0, self.steps) if self.steps > 0 else None,
                at_least("weight_decay", self.weight_decay, 0),
                positive("clip", self.clip),
                share("ema", self.ema),
                at_least("seed", self.seed, 0),
                at_least("save_every", self.save_every, 1),
                at_least("log_every", self.log_every, 1),
                *(_tracker_fault(name) for name in self.trackers),
                *(
                    f"tracking is told of {name!r}, which is none of the trackers"
                    for name in self.tracking
                    if name not in self.trackers
                ),
            ],
        )

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (counted from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "linear":
            return self.lr * (1 - done)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def arithmetic(self) -> dict[str, object]:
        """The settings that decide the weights: a resumed run must agree on them."""
        names = [
            "rows",
            "optimizer",
            "lr",
            "schedule",
            "warmup",
            "weight_decay",
            "clip",
            "ema",
            "seed",
        ]
        if self.schedule != "constant":
            names.append("steps")
        return {name: getattr(self, name) for name in names}


def _tracker_fault(name: str) -> str | None:
    """The fault of a tracker that is unknown, or that accelerate would pass over; or None."""
    here = [LoggerType.ALL, *get_available_trackers()]
    if name not in _TRACKERS or LoggerType(name) in here:
        return one_of("trackers", name, _TRACKERS)
    return f"trackers is {name!r}, whose package is not installed: pip install {name}"
