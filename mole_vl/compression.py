"""Updates as one LoRA of a rank, and what the rank misses (Eckart and Young, 1936)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mole_vl.experts import Expert, Factors
from mole_vl.faults import refuse, whole_at_least
from mole_vl.lowrank import product_svd
from mole_vl.updates import faults_of_dora


@dataclass(frozen=True)
class Merged:
    """One LoRA in place of several, and what it misses.

    Args:
        expert: The LoRA; its scale is 1 everywhere.
        error: Frobenius norm of what is missing over that of the whole update, by layer.
        total: The same over all layers at once; 0 to rounding where the rank holds everything.
    """

    expert: Expert
    error: Mapping[str, float]
    total: float


class Truncated(NamedTuple):
    """One layer's update at a rank; square sums of what is lost and of all."""

    factors: Factors
    lost: float
    size: float


@torch.no_grad()
def compressed(expert: Expert, rank: int | None = None) -> Merged:
    """The best LoRA of a rank for an expert's update, layer by layer, through its r x r core.

    Args:
        expert: Of any ranks and scales, such as `mole_vl.arithmetic.weighted_sum` makes.
        rank: The most that a layer may have; as much as it has now if not given.

    Raises:
        ValueError: A rank below 1, a DoRA, or an update that is zero everywhere.
    """
    refuse("compressed", [whole_at_least("rank", rank, 1), *faults_of_dora([expert])])
    parts = {
        path: truncated(own.a.float(), own.b.float() * own.scale, rank)
        for path, own in expert.layers.items()
    }
    return gathered("compressed", expert.name, parts)


def truncated(a: Tensor, b: Tensor, rank: int | None) -> Truncated:
    """The product of b (out, R) and a (R, ...) at a rank; all of it if None."""
    u, s, v = product_svd(b, a.flatten(1))
    return _cut(u, s, v, (b.shape[0], *a.shape[1:]), rank, a.dtype)


def truncated_dense(delta: Tensor, rank: int | None) -> Truncated:
    """A whole Delta-W, (out, ...), at a rank; all of it if None."""
    u, s, vh = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    return _cut(u, s, vh.T, tuple(delta.shape), rank, delta.dtype)


def _cut(
    u: Tensor, s: Tensor, v: Tensor, shape: tuple[int, ...], rank: int | None, dtype: torch.dtype
) -> Truncated:
    kept = min(len(s), rank or len(s))
    root = s[:kept].sqrt()
    down, up = (v[:, :kept] * root).T, u[:, :kept] * root
    factors = Factors(down.to(dtype).reshape(kept, *shape[1:]).contiguous(), up.to(dtype), 1.0)
    return Truncated(factors, float(s[kept:].square().sum()), float(s.square().sum()))


def gathered(subject: str, name: str, parts: Mapping[str, Truncated]) -> Merged:
    """Layers as one LoRA; a layer whose update is nothing is left as the base has it.

    Raises:
        ValueError: All of them are.
    """
    real = {path: part for path, part in parts.items() if part.size > 0}
    if not real:
        raise ValueError(f"{subject}: with these weights nothing changes the base")
    return Merged(
        Expert(name, {path: part.factors for path, part in real.items()}),
        {path: (part.lost / part.size) ** 0.5 for path, part in real.items()},
        (sum(p.lost for p in real.values()) / sum(p.size for p in real.values())) ** 0.5,
    )
