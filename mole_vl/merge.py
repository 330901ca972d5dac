"""A mixture as one ordinary LoRA, for tools that know nothing of gates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole_vl.experts import Expert, Factors
from mole_vl.faults import at_least, refuse
from mole_vl.losses import real_positions, weights_of_all
from mole_vl.lowrank import product_svd
from mole_vl.mixture import Mixture
from mole_vl.passes import Record


@dataclass(frozen=True)
class Merged:
    """One LoRA in place of a mixture, and what it misses.

    Args:
        expert: The LoRA; its scale is 1 everywhere.
        error: Frobenius norm of what is missing over that of the whole update, by layer.
        total: The same over all layers at once; 0 to rounding where the rank holds everything.
    """

    expert: Expert
    error: Mapping[str, float]
    total: float


@torch.no_grad()
def mean_weights(records: Sequence[Record]) -> dict[str, Tensor]:
    """The mean weights (E,) of each site over what `record()` listed: what a merge may stand for.

    They are the weights as the layers applied them, strength included. Every forward counts by its
    real rows and positions.

    Raises:
        ValueError: Nothing was recorded, or the weights of slots.
    """
    if any(record.output.slots for record in records):
        raise ValueError("mean_weights: these gates weigh slots, whose experts change by row")
    if not records:
        raise ValueError("no gate result was recorded: run the model inside record()")
    return site_means(records)


@torch.no_grad()
def site_means(records: Sequence[Record]) -> dict[str, Tensor]:
    """The mean weights of each site as its gates gave them: of its experts (E,), or slots (S,)."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for record in records:
        weights, real = real_positions(record, weights_of_all(record))
        weights = weights * record.strength
        total = weights.reshape(-1, weights.shape[-1]).sum(0)
        sums[record.site] = sums.get(record.site, torch.zeros_like(total)) + total
        counts[record.site] = counts.get(record.site, torch.zeros_like(real.sum())) + real.sum()
    return {site: total / counts[site] for site, total in sums.items()}


@torch.no_grad()
def merged(
    mixture: Mixture,
    name: str,
    weights: Tensor | Mapping[str, Any] | None = None,
    rank: int | None = None,
) -> Merged:
    """The best LoRA of a rank for a mixture under constant weights (Eckart and Young, 1936).

    The update is decomposed through its r x r core, so no layer's full Delta-W is.

    Args:
        mixture: The mixture.
        name: The new expert's name.
        weights: As for `Mixture.bake`.
        rank: The most that a layer may have; as much as its experts have together if not given.

    Raises:
        ValueError: A rank below 1, or weights that `bake` would refuse, or that are all zero.
    """
    whole = rank is None or (isinstance(rank, int) and not isinstance(rank, bool))
    fault = at_least("rank", rank, 1) if whole else f"rank is {rank!r}, expected a whole number"
    refuse("merged", [fault])
    layers, error, missed, entire = {}, {}, 0.0, 0.0
    for path, own in mixture.constant_weights(weights).items():
        a, b = mixture.layers[path].stacked(own)
        factors, lost, size = _truncated(a, b, rank)
        if size == 0:
            continue  # An update of nothing: the layer is as the base has it.
        layers[path], error[path] = factors, (lost / size) ** 0.5
        missed, entire = missed + lost, entire + size
    if not layers:
        raise ValueError("merged: with these weights nothing changes the base")
    return Merged(Expert(name, layers), error, (missed / entire) ** 0.5)


def _truncated(a: Tensor, b: Tensor, rank: int | None) -> tuple[Factors, float, float]:
    """Product of b (out, R) and a (R, ...) at a rank; square sums of what is lost and of all."""
    u, s, v = product_svd(b, a.flatten(1))
    kept = min(len(s), rank or len(s))
    root = s[:kept].sqrt()
    down, up = (v[:, :kept] * root).T, u[:, :kept] * root
    factors = Factors(
        down.to(a.dtype).reshape(kept, *a.shape[1:]).contiguous(), up.to(b.dtype), 1.0
    )
    return factors, float(s[kept:].square().sum()), float(s.square().sum())
