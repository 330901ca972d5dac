"""Merges that drop entries of Delta-W first: TIES and DARE, for experts of any ranks and layers.

Entries belong to Delta-W, not to the factors, whose entries change with a rotation in rank space
and whose merge is another update (peft's `ties` and `dare_linear`). Delta-W of one expert at one
layer is in memory at a time.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from mole_vl.arithmetic import faults_of_weights
from mole_vl.compression import Merged, gathered, truncated_dense
from mole_vl.experts import Expert, Factors
from mole_vl.faults import one_of, refuse, whole_at_least
from mole_vl.magnitude import kth_largest
from mole_vl.updates import updates_by_layer

Over = Literal["network", "layer"]
# An expert's place and its factors at a layer: what is left of its update there.
_Thin = Callable[[int, str, Factors], Tensor]


@torch.no_grad()
def ties(
    name: str,
    experts: Sequence[Expert],
    *,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    over: Over = "network",
    rank: int | None = None,
) -> Merged:
    """Trim each update, elect a sign for each entry, average those that have it (2306.01708).

    The sign is that of the sum of the trimmed entries; the mean is over the experts whose entry is
    not zero and has it. A layer that an expert leaves alone has no say.

    Args:
        name: The new expert's.
        experts: At least one.
        density: Share of each update's entries that is kept, the largest; equal ones all are.
        weights: What each update counts in the mean, after the vote, as in peft; 1 each if not
            given.
        over: Whether the largest are found over all layers of an expert, as in the paper, or in
            each by itself, as in peft.
        rank: The most that a layer of the result may have; None for the layer's full rank, which
            misses nothing.

    Returns:
        One LoRA, and the error that its rank costs.

    Raises:
        ValueError: A density outside (0, 1], weights that are not one finite number for each
            expert, a rank below 1; experts that share a name, a DoRA, a layer that two know in
            different shapes; a merge that is zero.
    """
    updates = updates_by_layer("ties", experts)
    weights = [1.0] * len(experts) if weights is None else weights
    refuse(
        "ties", [*_faults(experts, density, weights, rank), one_of("over", over, get_args(Over))]
    )
    everywhere = over == "network"
    least = [_threshold([*one.layers.values()], density) if everywhere else None for one in experts]

    def trimmed(place: int, path: str, factors: Factors) -> Tensor:
        own, bound = factors.delta(), least[place]
        bound = _threshold([factors], density) if bound is None else bound
        return own.where(own.abs() >= bound, 0.0)

    parts = {
        path: truncated_dense(_elected(list(_present(path, own, weights, trimmed))), rank)
        for path, own in updates.items()
    }
    return gathered("ties", name, parts)


@torch.no_grad()
def dare(
    name: str,
    experts: Sequence[Expert],
    *,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    elect: bool = False,
    seed: int = 0,
    rank: int | None = None,
) -> Merged:
    """Drop entries of each update at random, rescale the others by 1 / density, add (2311.03099).

    What an expert loses at a layer is drawn from the seed, its name and the layer's path: neither
    the factors nor the other experts change it.

    Args:
        name: The new expert's.
        experts: At least one.
        density: Probability that an entry is kept.
        weights: What each update counts; if not given 1/E each, or 1 each with `elect`.
        elect: Whether signs are elected and the mean is taken as by `ties`, instead of the sum.
        seed: Of the draws.
        rank: As for `ties`.

    Returns:
        One LoRA, and the error that its rank costs.

    Raises:
        ValueError: As for `ties`.
    """
    updates = updates_by_layer("dare", experts)
    weights = [1.0 if elect else 1 / len(experts)] * len(experts) if weights is None else weights
    refuse("dare", [*_faults(experts, density, weights, rank), whole_at_least("seed", seed, 0)])

    def dropped(place: int, path: str, factors: Factors) -> Tensor:
        own = factors.delta()
        drawn = torch.rand(own.shape, generator=_generator(seed, experts[place].name, path))
        return own.where(drawn.to(own.device) < density, 0.0) / density

    merge = _elected if elect else _summed
    parts = {
        path: truncated_dense(merge(list(_present(path, own, weights, dropped))), rank)
        for path, own in updates.items()
    }
    return gathered("dare", name, parts)


def _faults(
    experts: Sequence[Expert], density: float, weights: Sequence[float], rank: int | None
) -> list[str | None]:
    kept = None if 0 < density <= 1 else f"density is {density}, expected 0 < density <= 1"
    return [kept, *faults_of_weights(experts, weights), whole_at_least("rank", rank, 1)]


def _threshold(layers: Sequence[Factors], density: float) -> float:
    """The least magnitude that is kept of an expert's entries at these layers."""
    entries = sum(own.b.shape[0] * own.a[0].numel() for own in layers)
    return kth_largest(lambda: (own.delta() for own in layers), max(1, int(density * entries)))


def _generator(seed: int, name: str, path: str) -> torch.Generator:
    drawn = hashlib.sha256(f"{seed} {name} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(drawn[:7], "big"))


def _present(
    path: str, updates: Sequence[Factors | None], weights: Sequence[float], thin: _Thin
) -> Iterator[tuple[float, Callable[[], Tensor]]]:
    """Weight and what is left of the update, made when asked, of each expert that has one."""
    for place, (factors, weight) in enumerate(zip(updates, weights, strict=True)):
        if factors is not None:
            yield weight, partial(thin, place, path, factors)


def _summed(parts: Sequence[tuple[float, Callable[[], Tensor]]]) -> Tensor:
    (weight, first), *others = parts
    total = weight * first()
    for weight, thin in others:
        total += weight * thin()
    return total


def _elected(parts: Sequence[tuple[float, Callable[[], Tensor]]]) -> Tensor:
    """Weighted mean over those entries that are not zero and have the sign of their sum."""
    sign = torch.where(_summed([(1.0, thin) for _, thin in parts]) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, thin in parts:
        own = thin()
        agrees = own.sign() == sign
        total += weight * own * agrees
        count += agrees
    return total / count.clamp_min(1)
