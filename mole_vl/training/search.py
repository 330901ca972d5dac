"""Constant weights by black-box search: no gradient, no state but the weights (LoRAHub)."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nevergrad as ng
import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from mole_vl.faults import at_least, between, refuse
from mole_vl.files import check_output, new_file, read_object
from mole_vl.gates import ConstantGate
from mole_vl.mixture import Mixture
from mole_vl.training.alone import alone_in
from mole_vl.training.share import Share
from mole_vl.training.task import Task

EVALUATIONS = "evaluations.json"
# What the search is told of weights whose loss is no finite number.
_WORST = 1e9


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of the search; the defaults are LoRAHub's (arXiv 2307.13269).

    Args:
        output: Folder of `evaluations.json`; a search found there is resumed.
        evaluations: How often weights are tried.
        rows: Examples that every trial is judged by, the same ones each time, over all processes.
        micro_rows: Examples that one process holds at once; None for its whole part.
        low: Least weight.
        high: Greatest weight.
        l1: Factor of the weights' mean absolute value beside the loss.
        optimizer: A nevergrad optimiser by name.
        seed: Seed of the search and of the examples.
        progress: Whether a progress bar is shown.
    """

    output: Path
    evaluations: int = 40
    rows: int = 16
    micro_rows: int | None = None
    low: float = -1.5
    high: float = 1.5
    l1: float = 0.05
    optimizer: str = "NGOpt"
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        refuse(
            "SearchConfig",
            [
                at_least("evaluations", self.evaluations, 1),
                at_least("rows", self.rows, 1),
                at_least("micro_rows", self.micro_rows, 1),
                None
                if -math.inf < self.low <= 0 <= self.high < math.inf and self.low < self.high
                else f"low and high are {self.low} and {self.high}, expected low <= 0 <= high, "
                "both finite: the search starts at 0",
                at_least("l1", self.l1, 0),
                None
                if self.optimizer in ng.optimizers.registry
                else f"optimizer is {self.optimizer!r}, expected one that nevergrad registers, "
                "such as NGOpt, CMA, TwoPointsDE or OnePlusOne",
                # What numpy's RandomState takes.
                between("seed", self.seed, 0, 2**32 - 1),
            ],
        )

    def arithmetic(self) -> dict[str, object]:
        """The settings that decide what is found: a resumed search must agree on them."""
        names = ("evaluations", "rows", "low", "high", "l1", "optimizer", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Trial:
    """Weights that were tried: all gates' in order, and the loss, None where it is not finite."""

    weights: tuple[float, ...]
    loss: float | None

    def objective(self, l1: float) -> float:
        """What is minimised."""
        if self.loss is None:
            return _WORST
        return self.loss + l1 * float(np.abs(self.weights).mean())


@dataclass(frozen=True)
class Found:
    """The best weights, by component, site and name, and all that was tried."""

    weights: Mapping[str, Mapping[str, Mapping[str, float]]]
    best: Trial
    trials: Sequence[Trial]


class _Search:
    """A search in progress."""

    def __init__(
        self,
        task: Task,
        mixtures: Mapping[str, Mixture],
        config: SearchConfig,
        settings: Mapping[str, object],
    ) -> None:
        self.task, self.mixtures, self.config = task, mixtures, config
        self.accelerator = Accelerator()
        self.file = config.output / EVALUATIONS
        # As JSON would give them back.
        told = {**config.arithmetic(), **settings}
        self.settings: dict[str, object] = json.loads(json.dumps(told, default=str))
        self.gates = [
            (component, site, mixture.gate(site))
            for component, mixture in mixtures.items()
            for site in mixture.sites
        ]
        task.place(self.accelerator.device)
        share = Share(self.accelerator, config.rows, config.micro_rows)
        self.pieces = share.pieces(task, config.seed, 0)
        self.trials: list[Trial] = []
        self.known: dict[tuple[float, ...], Trial] = {}

    def resume(self) -> None:
        """Take up what was tried before."""
        if not self.file.exists():
            return
        content = read_object(self.file)
        try:
            settings = dict(content["settings"])
            trials = [Trial(tuple(one["weights"]), one["loss"]) for one in content["trials"]]
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"search: {self.file} is no list of trials: remove it, or take another output "
                "folder"
            ) from error
        names = dict.fromkeys([*self.settings, *settings])
        faults = [
            f"{name} was {settings.get(name)!r}, is {self.settings.get(name)!r}"
            for name in names
            if settings.get(name) != self.settings.get(name)
        ]
        if faults:
            raise ValueError(
                f"search: what {self.file} holds was tried with other settings "
                f"({'; '.join(faults)}); take another output folder, or remove this one"
            )
        self.known = {trial.weights: trial for trial in trials}

    def tried(self, weights: tuple[float, ...]) -> Trial:
        """A trial of these weights; what was tried before is not tried again."""
        if weights not in self.known:
            self.known[weights] = Trial(weights, self._loss(weights))
            self._save()
        self.trials.append(self.known[weights])
        return self.trials[-1]

    @torch.no_grad()
    def put(self, weights: Sequence[float]) -> dict[str, dict[str, dict[str, float]]]:
        """Give the gates these weights; returns them by component, site and name."""
        named: dict[str, dict[str, dict[str, float]]] = {}
        rest = list(weights)
        for component, site, gate in self.gates:
            assert isinstance(gate, ConstantGate)
            names = self.mixtures[component].weighed
            mine, rest = rest[: len(names)], rest[len(names) :]
            gate.values.copy_(torch.tensor(mine))
            named.setdefault(component, {})[site] = dict(zip(names, mine, strict=True))
        return named

    @torch.no_grad()
    def _loss(self, weights: tuple[float, ...]) -> float | None:
        self.put(weights)
        tally = self.pieces.tally()
        for batch, units in self.pieces:
            with self.accelerator.autocast():
                terms = self.task.losses(batch)
            tally.add(terms, units)
        loss = tally.values().loss
        return loss if math.isfinite(loss) else None

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            trials = [{"weights": t.weights, "loss": t.loss} for t in self.known.values()]
            with new_file(self.file) as partial:
                partial.write_text(json.dumps({"settings": self.settings, "trials": trials}))


def search(
    task: Task,
    mixtures: Mapping[str, Mixture],
    config: SearchConfig,
    settings: Mapping[str, object] | None = None,
) -> Found:
    """Find the constant weights of `LoRAHub` gates that a task's loss likes best.

    The loss of the same examples is asked at every trial, without gradient. Stopped at any moment,
    it goes on where it was: trials are kept, and the optimiser asks for the same ones again.

    Args:
        task: Its loss; what it trains is left alone.
        mixtures: The mixtures in its model by component, mixed with `LoRAHub` gates.
        config: Trials, bounds, examples, output.
        settings: What else decides the loss, as plain data: a search found in the output folder is
            continued only where it agrees.

    Returns:
        The best trial; the gates hold its weights.

    Raises:
        ValueError: Other gates; the settings contradict the processes or the search found in the
            output folder; that folder cannot be written, or another run is at work in it.
        FloatingPointError: No trial had a finite loss.
        RuntimeError: The optimiser broke down.
    """
    odd = [m for m in mixtures.values() if not all(_constant(m, site) for site in m.sites)]
    if odd:
        raise ValueError(f"search: the gates are {odd[0].spec}, expected LoRAHub()")
    check_output("search", config.output)
    run = _Search(task, mixtures, config, settings or {})
    config.output.mkdir(parents=True, exist_ok=True)
    with alone_in(config.output, run.accelerator.is_main_process):
        run.resume()
        run.accelerator.wait_for_everyone()
        best = _best(run)
    if best.loss is None:
        raise FloatingPointError(
            f"search: none of {len(run.trials)} trials had a finite loss; narrow low and high, or "
            "look at the examples"
        )
    return Found(run.put(best.weights), best, run.trials)


def _best(run: _Search) -> Trial:
    config = run.config
    start = np.zeros(sum(len(run.mixtures[part].weighed) for part, _, _ in run.gates))
    space = ng.p.Array(init=start).set_bounds(config.low, config.high)
    # Processes draw alike, so that all of them try the same weights at once.
    space.random_state = np.random.RandomState(config.seed)
    optimizer = ng.optimizers.registry[config.optimizer](space, budget=config.evaluations)
    quiet = not (config.progress and run.accelerator.is_main_process)
    with warnings.catch_warnings():
        # What nevergrad asks of scipy is scipy's to mend, and is mended there.
        warnings.filterwarnings("ignore", "COBYLA: Invalid")
        for _ in tqdm(range(config.evaluations), desc=config.output.name, disable=quiet):
            asked = _asked(optimizer, run)
            trial = run.tried(tuple(float(weight) for weight in asked.value))
            optimizer.tell(asked, trial.objective(config.l1))
    return min(run.trials, key=lambda trial: trial.objective(config.l1))


def _asked(optimizer: Any, run: _Search) -> Any:
    try:
        return optimizer.ask()
    except TypeError as error:
        # nevergrad 1.0.12 on numpy 2.5: the models of NGOpt for few weights and many trials.
        raise RuntimeError(
            f"search: nevergrad's {run.config.optimizer} broke down after {len(run.trials)} trials "
            f"of {run.config.evaluations} ({error}); take fewer evaluations, or another optimizer, "
            "such as CMA, and another output folder"
        ) from error


def _constant(mixture: Mixture, site: str) -> bool:
    return isinstance(mixture.gate(site), ConstantGate)
