"""Centring: before gates are trained, their features' common part is taken away."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mole_vl.gates.scores import HiddenScore
from mole_vl.mixture import Mixture
from mole_vl.passes import Record
from mole_vl.training.rows import rows_of_step
from mole_vl.training.task import Task


@torch.no_grad()
def centre_gates(
    mixtures: Iterable[Mixture], task: Task, *, rows: int, batches: int = 4, seed: int = 0
) -> None:
    """Set the centre of every gate with `Hidden` scores to its mean feature over a task's rows.

    Every process runs all rows, and a resumed run the same ones: the centres are the same.

    Args:
        mixtures: The mixtures in the task's model, their gates untrained.
        task: Runs its forwards; its loss is not used.
        rows: Rows of a batch.
        batches: How many batches.
        seed: As for `fit`.
    """
    task.place(Accelerator().device)
    for mixture in mixtures:
        sums: dict[str, Tensor] = {}
        counts: dict[str, float] = {}
        scores = _hidden_scores(mixture)
        for step in range(batches if scores else 0):
            for name, features in _features(mixture, scores, task, step, rows, seed):
                sums[name] = sums.get(name, 0) + features.sum(0)
                counts[name] = counts.get(name, 0) + len(features)
        for name, total in sums.items():
            scores[name].centre.copy_(total / counts[name])


def _hidden_scores(mixture: Mixture) -> dict[str, HiddenScore]:
    found = {name: getattr(mixture.gate(name), "score", None) for name in mixture.sites}
    return {name: score for name, score in found.items() if isinstance(score, HiddenScore)}


def _features(
    mixture: Mixture,
    scores: dict[str, HiddenScore],
    task: Task,
    step: int,
    rows: int,
    seed: int,
) -> Iterable[tuple[str, Tensor]]:
    """What each score reads in one batch's forwards, (N, d), by site."""
    seen: dict[str, list[Tensor]] = {name: [] for name in scores}
    hooks = [
        score.register_forward_pre_hook(partial(_note, seen[name]))
        for name, score in scores.items()
    ]
    try:
        with mixture.record() as records:
            task.losses(task.batch(rows_of_step(seed, step, rows)))
    finally:
        for hook in hooks:
            hook.remove()
    for name, inputs in seen.items():
        told = [record for record in records if record.site == name]
        # Forwards that took over held weights are recorded too, after the one that found them.
        for x, record in zip(inputs, told[: len(inputs)], strict=True):
            yield name, _real(scores[name].features(x), record)


def _note(seen: list[Tensor], _score: nn.Module, args: Any) -> None:
    seen.append(args[0])


def _real(features: Tensor, record: Record) -> Tensor:
    """Features (N, d) of rows, or of the positions that are no padding."""
    if features.dim() == 3 and record.real is not None:
        return features[record.real]
    return features.reshape(-1, features.shape[-1])
