"""Mixtures in which each row, or each position, has few of many experts: cost follows K, not E.

Pure functions beside `plans.dense`, equal to it in value and in every gradient. Shape legend:
n positions, m positions times their experts, r rows, i in_features, o out_features, R rank summed
over experts, E experts, K chosen ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# What torch's grouped product asks of its operands' types, and of their strides in bytes.
_GROUPED = (torch.float32, torch.float16, torch.bfloat16)
_STRIDE = 16


class Groups(NamedTuple):
    """Positions by the experts that they go to: all of the first expert, then of the second.

    Args:
        places: Which position each is, (m,); one that goes to several experts stands once for each.
        ends: Behind the last one of each expert, (E,).
        weights: What each is weighed by, (m, 1).
        choices: Which of its position's experts it is for, (m,), 0 for the first.
        experts: Whose it is, (m,).
    """

    places: Tensor
    ends: Tensor
    weights: Tensor
    choices: Tensor
    experts: Tensor

    @classmethod
    def of(cls, weights: Tensor, chosen: Tensor, experts: int) -> "Groups":
        """Group positions.

        Args:
            weights: Of each position's experts, (..., K).
            chosen: Which experts, (..., K), none twice at one position; below 0 for nobody.
            experts: E.
        """
        flat = chosen.flatten()
        counts = torch.bincount(flat.clamp_min(-1) + 1, minlength=experts + 1)
        order = flat.argsort(stable=True)[int(counts[0]) :]
        k, ends = chosen.shape[-1], counts[1:].cumsum(0)
        weighed = weights.reshape(-1, 1).index_select(0, order)
        return cls(order // k, ends, weighed, order % k, flat[order])


def sparse(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, chosen: Tensor, ranks: Sequence[int]
) -> Tensor:
    """Each position's few experts: `sum_k w_k B_e(k) (A_e(k) x)`, positions grouped by expert.

    Args:
        x: Layer input, (..., i).
        a: Stacked down projections, (R, i).
        b: Stacked up projections, (o, R).
        weights: Of each chosen expert, its scale included, (..., K).
        chosen: Which experts, (..., K); none twice at one position, below 0 for nobody.
        ranks: Each expert's rank, 0 for one that leaves the layer alone.

    Returns:
        The update of the layer's output, (..., o).
    """
    # Wide before they are gathered: the gradient adds up over a position's experts in that type.
    wide = torch.promote_types(x.dtype, _product_type(x, a))
    positions_ni = x.reshape(-1, x.shape[-1]).to(wide)
    groups = Groups.of(weights, chosen, len(ranks))
    # Not by brackets: the gradient of those adds up position by position, several times as slowly.
    own_mi = positions_ni.index_select(0, groups.places)
    parts_mo = products(own_mi, a, b, groups.weights, groups.ends, ranks)
    y = parts_mo.new_zeros(len(positions_ni), b.shape[0]).index_add(0, groups.places, parts_mo)
    return y.view(*x.shape[:-1], b.shape[0])


def products(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, ends: Tensor, ranks: Sequence[int]
) -> Tensor:
    """`w B_e (A_e x)` of inputs that are grouped by expert.

    One grouped product for each factor where torch has one for such shapes (equal ranks, strides of
    16 bytes); otherwise a product for each expert that was chosen, over its own inputs. In a's
    type, or under autocast in that one's.

    Args:
        x: Inputs, those of one expert behind those of the one before, (m, i).
        a: Stacked down projections, (R, i).
        b: Stacked up projections, (o, R).
        weights: Of each input, (m, 1).
        ends: Behind the last input of each expert, (E,).
        ranks: Each expert's rank, 0 for one that leaves the layer alone.

    Returns:
        (m, o).
    """
    x, a, b, weights = (one.to(_product_type(x, a)) for one in (x, a, b, weights))
    if _groupable(a, b, ranks):
        down = a.view(len(ranks), -1, a.shape[1]).transpose(1, 2)
        up = b.T.reshape(len(ranks), -1, b.shape[0])
        offsets = ends.int()
        return F.grouped_mm(F.grouped_mm(x, down, offs=offsets) * weights, up, offs=offsets)
    # None at all, to begin with: gradients of zero reach everything, whoever is chosen.
    parts = [F.linear(F.linear(x[:0], a) * weights[:0], b)]
    rank = start = 0
    for width, end in zip(ranks, ends.tolist(), strict=True):
        if end > start:
            own = slice(rank, rank + width)
            hidden = F.linear(x[start:end], a[own]) * weights[start:end]
            parts.append(F.linear(hidden, b[:, own]))
        rank, start = rank + width, end
    return torch.cat(parts)


def _product_type(x: Tensor, a: Tensor) -> torch.dtype:
    """What autocast does to other products, it leaves to the grouped one's caller."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype


def _groupable(a: Tensor, b: Tensor, ranks: Sequence[int]) -> bool:
    if torch.compiler.is_compiling() and a.dtype == torch.float32:
        # What torch compiles by knows this product in half precision alone.
        return False
    rank, size = ranks[0], a.element_size()
    strides = (rank * size, a.shape[1] * size, b.shape[0] * size)
    aligned = not any(stride % _STRIDE for stride in strides)
    return a.dtype in _GROUPED and rank > 0 and len(set(ranks)) == 1 and aligned


def per_sample(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, chosen: Tensor, ranks: Sequence[int]
) -> Tensor:
    """Each row's few experts, gathered: two batched products whose size is K, whatever E.

    Args:
        x: Layer input, (r, ..., i).
        a: Stacked down projections, (R, i).
        b: Stacked up projections, (o, R).
        weights: Of each row's experts, their scales included, (r, K).
        chosen: Which experts, (r, K); below 0, with weight 0, for nobody.
        ranks: Each expert's rank, 0 for one that leaves the layer alone.

    Returns:
        The update of the layer's output, (r, ..., o).
    """
    sizes = torch.tensor(ranks, device=chosen.device)
    steps = torch.arange(max(ranks), device=chosen.device)
    chosen = chosen.clamp_min(0)
    own = sizes[chosen].unsqueeze(-1)
    # Beyond a small expert's own rank stands any other, at weight zero.
    places = ((sizes.cumsum(0) - sizes)[chosen].unsqueeze(-1) + steps).clamp_max(len(a) - 1)
    rank_weights = (weights.unsqueeze(-1) * (steps < own)).flatten(1).to(a.dtype)
    rows = x.to(a.dtype).reshape(len(x), x.shape[1:-1].numel(), x.shape[-1])
    places = places.flatten(1)
    # Not by brackets, as above.
    down, up = (
        one.index_select(0, places.flatten()).unflatten(0, places.shape) for one in (a, b.T)
    )
    hidden = rows @ down.transpose(1, 2)
    y = (hidden * rank_weights.unsqueeze(1)) @ up
    return y.view(*x.shape[:-1], b.shape[0])
