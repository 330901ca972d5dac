"""Mixtures in which each row, or each position, has few of many experts: cost follows K, not E.

Pure functions beside `plans.dense`, equal to it in value and in every gradient. Shape legend:
n positions, r rows, i in_features, o out_features, R rank summed over experts, E experts, K chosen
ones.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# What torch's grouped product asks of its operands' types, and of their strides in bytes.
_GROUPED = (torch.float32, torch.float16, torch.bfloat16)
_STRIDE = 16


def sparse(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, chosen: Tensor, ranks: Sequence[int]
) -> Tensor:
    """Each position's few experts: `sum_k w_k B_e(k) (A_e(k) x)`, positions grouped by expert.

    One grouped product for each factor where torch has one for such shapes (equal ranks, strides of
    16 bytes); otherwise a product for each expert that was chosen, over its own positions.

    Args:
        x: Layer input, (..., i).
        a: Stacked down projections, (R, i).
        b: Stacked up projections, (o, R).
        weights: Of each chosen expert, its scale included, (..., K).
        chosen: Which experts, (..., K); none twice at one position.
        ranks: Each expert's rank, 0 for one that leaves the layer alone.

    Returns:
        The update of the layer's output, (..., o).
    """
    positions_ni = x.to(a.dtype).reshape(-1, x.shape[-1])
    experts = chosen.flatten()
    order = experts.argsort(stable=True)
    place = order // chosen.shape[-1]
    ends = torch.bincount(experts, minlength=len(ranks)).cumsum(0)
    weights_n1 = weights.reshape(-1, 1)[order].to(a.dtype)
    if _groupable(a, b, ranks):
        down = a.view(len(ranks), -1, a.shape[1]).transpose(1, 2)
        up = b.T.reshape(len(ranks), -1, b.shape[0])
        offsets = ends.int()
        hidden = F.grouped_mm(positions_ni[place], down, offs=offsets) * weights_n1
        parts = F.grouped_mm(hidden, up, offs=offsets)
    else:
        place, parts = _segments(positions_ni, a, b, weights_n1, place, ends, ranks)
    y = parts.new_zeros(len(positions_ni), b.shape[0]).index_add(0, place, parts)
    return y.view(*x.shape[:-1], b.shape[0])


def _groupable(a: Tensor, b: Tensor, ranks: Sequence[int]) -> bool:
    rank, size = ranks[0], a.element_size()
    strides = (rank * size, a.shape[1] * size, b.shape[0] * size)
    aligned = not any(stride % _STRIDE for stride in strides)
    return a.dtype in _GROUPED and rank > 0 and len(set(ranks)) == 1 and aligned


def _segments(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    place: Tensor,
    ends: Tensor,
    ranks: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """What each chosen expert adds, and to which positions."""
    # None at all, to begin with: gradients of zero reach everything, whoever is chosen.
    none = F.linear(F.linear(x[place[:0]], a) * weights[:0], b)
    whose, parts, rank, start = [place[:0]], [none], 0, 0
    for width, end in zip(ranks, ends.tolist(), strict=True):
        if width and end > start:
            own = slice(rank, rank + width)
            hidden = F.linear(x[place[start:end]], a[own]) * weights[start:end]
            whose.append(place[start:end])
            parts.append(F.linear(hidden, b[:, own]))
        rank, start = rank + width, end
    return torch.cat(whose), torch.cat(parts)


def per_sample(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, chosen: Tensor, ranks: Sequence[int]
) -> Tensor:
    """Each row's few experts, gathered: two batched products whose size is K, whatever E.

    Args:
        x: Layer input, (r, ..., i).
        a: Stacked down projections, (R, i).
        b: Stacked up projections, (o, R).
        weights: Of each row's experts, their scales included, (r, K).
        chosen: Which experts, (r, K).
        ranks: Each expert's rank, 0 for one that leaves the layer alone.

    Returns:
        The update of the layer's output, (r, ..., o).
    """
    sizes = torch.tensor(ranks, device=chosen.device)
    steps = torch.arange(max(ranks), device=chosen.device)
    own = sizes[chosen].unsqueeze(-1)
    # Beyond a small expert's own rank stands any other, at weight zero.
    places = ((sizes.cumsum(0) - sizes)[chosen].unsqueeze(-1) + steps).clamp_max(len(a) - 1)
    rank_weights = (weights.unsqueeze(-1) * (steps < own)).flatten(1).to(a.dtype)
    places = places.flatten(1)
    rows = x.to(a.dtype).reshape(x.shape[0], -1, x.shape[-1])
    hidden = rows @ a[places].transpose(1, 2)
    y = (hidden * rank_weights.unsqueeze(1)) @ b.T[places]
    return y.view(*x.shape[:-1], b.shape[0])
