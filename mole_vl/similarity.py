"""How alike experts are: inner products and cosines of Delta-W, without ever forming it.

Over one layer `<Delta-W_1, Delta-W_2> = s_1 s_2 sum((B_1^T B_2) * (A_1 A_2^T))`, a sum over the
entries of two r x r cores, so that ranks may differ; over several layers the products add up, and a
layer that an expert leaves alone counts as zero. Unlike the factors' own cosine, which the
clustering of arXiv 2405.11157 is made of, nothing changes when (A, B) becomes (R A, B R^-1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_vl.experts import Expert, Factors
from mole_vl.faults import some
from mole_vl.updates import stacked_factors, updates_by_layer


@torch.no_grad()
def grams_by_layer(experts: Sequence[Expert]) -> dict[str, Tensor]:
    """Inner products of all experts' Delta-W at each layer, (E, E) in fp64, by the layer's path.

    Args:
        experts: At least one; ranks, alphas and layers may differ.

    Raises:
        ValueError: Experts that share a name, a DoRA, or a layer that two know in different shapes.
    """
    updates = updates_by_layer("similarity", experts)
    return {path: _gram(own) for path, own in updates.items()}


def gram(experts: Sequence[Expert]) -> Tensor:
    """Inner products of all experts' Delta-W over all layers, (E, E) in fp64.

    Args:
        experts: At least one; ranks, alphas and layers may differ.

    Raises:
        ValueError: Experts that share a name, a DoRA, or a layer that two know in different shapes.
    """
    return torch.stack(list(grams_by_layer(experts).values())).sum(0)


def similarity(experts: Sequence[Expert]) -> Tensor:
    """Cosines of all experts' Delta-W over all layers, (E, E) in fp64.

    Args:
        experts: At least one; ranks, alphas and layers may differ.

    Raises:
        ValueError: Experts that share a name, a DoRA, a layer that two know in different shapes, or
            an expert whose update is zero and so has no direction.
    """
    return cosines(gram(experts), [expert.name for expert in experts])


def cosines(products: Tensor, names: Sequence[str]) -> Tensor:
    """Cosines of vectors whose inner products (E, E) are given; 1 on the diagonal exactly.

    Raises:
        ValueError: A vector of length zero.
    """
    norms = products.diagonal().clamp_min(0).sqrt()
    zero = [name for name, norm in zip(names, norms.tolist(), strict=True) if norm == 0]
    if zero:
        raise ValueError(
            f"similarity: the update of {some(zero)} is zero, and has no direction to compare; "
            "leave it out"
        )
    return _tidy(products / norms.outer(norms))


def _tidy(found: Tensor) -> Tensor:
    """Symmetric, within [-1, 1], 1 on the diagonal: what rounding took is put back."""
    found = ((found + found.T) / 2).clamp(-1, 1)
    return found.fill_diagonal_(1.0)


def _gram(updates: Sequence[Factors | None]) -> Tensor:
    """Inner products of one layer's updates, (E, E)."""
    a, b = stacked_factors([own for own in updates if own is not None])
    ranks = torch.tensor([0 if own is None else own.rank for own in updates], device=a.device)
    segments = torch.repeat_interleave(torch.arange(len(updates), device=a.device), ranks)
    cores_RR = (b.T @ b) * (a @ a.T)
    rows_ER = cores_RR.new_zeros(len(updates), len(segments)).index_add_(0, segments, cores_RR)
    found = rows_ER.new_zeros(len(updates), len(updates)).index_add_(1, segments, rows_ER)
    return found.cpu()
