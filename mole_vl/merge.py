"""A mixture as one ordinary LoRA, for tools that know nothing of gates."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mole_vl.compression import Merged, gathered, truncated
from mole_vl.faults import refuse, whole_at_least
from mole_vl.losses import real_positions, weights_of_all
from mole_vl.mixture import Mixture
from mole_vl.passes import Record


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
    refuse("merged", [whole_at_least("rank", rank, 1)])
    parts = {
        path: truncated(*mixture.layers[path].stacked(own), rank)
        for path, own in mixture.constant_weights(weights).items()
    }
    return gathered("merged", name, parts)
