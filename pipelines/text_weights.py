"""Weights that a caller gives for prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pipelines.weights import in_order

# For all prompts: weights by expert's name (zero for the others), or (E,) in the experts' order, or
# one of these by site; or for each prompt an expert's name, weights by name, or a row of (rows, E).
TextWeights: TypeAlias = (
    Mapping[str, Any] | Tensor | Sequence[float] | Sequence[str | Mapping[str, float]]
)


def weights_of_rows(
    weights: TextWeights, names: Sequence[str], rows: int
) -> Tensor | Mapping[str, Any]:
    """Weights as `Mixture.pinned` takes them.

    Args:
        weights: As the caller has them.
        names: The experts in order.
        rows: How many prompts there are.

    Raises:
        ValueError: No weights, or of other experts, or for another number of prompts.
    """
    if isinstance(weights, Mapping):
        return weights
    given: Any = weights
    if isinstance(given, str) or not isinstance(given, Tensor | Sequence):
        raise ValueError(
            f"weights is {given!r}, expected weights by expert's name, or a list with an "
            "expert's name, or weights, for each prompt"
        )
    if not isinstance(given, Tensor) and any(isinstance(w, str | Mapping) for w in given):
        given = [
            in_order(names, {one: 1.0} if isinstance(one, str) else one, f"weights[{place}]")
            for place, one in enumerate(given)
        ]
    found = torch.as_tensor(given, dtype=torch.float32)
    if found.dim() == 2 and len(found) != rows:
        raise ValueError(f"weights are for {len(found)} prompts, and there are {rows}")
    if found.dim() not in (1, 2):
        raise ValueError(
            f"weights of shape {tuple(found.shape)}, expected ({len(names)},) or ({rows}, "
            f"{len(names)}), for {rows} prompts and {', '.join(names)}"
        )
    return found
