"""Experts as points: the singular value decomposition of their stacked, flattened Delta-W."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_vl.experts import Expert
from mole_vl.faults import refuse, whole_at_least
from mole_vl.similarity import gram


@dataclass(frozen=True)
class Embedding:
    """Experts as points whose inner products are those of their Delta-W.

    Args:
        names: The experts in order.
        vectors: (E, n) in fp64, the coordinate of the largest spread first.
        spectrum: Singular values of the stack, (E,), falling; the first n are those kept.
    """

    names: tuple[str, ...]
    vectors: Tensor
    spectrum: Tensor

    @property
    def held(self) -> float:
        """Share of the updates' sum of squares that the coordinates hold."""
        square = self.spectrum.square()
        whole = float(square.sum())
        return float(square[: self.vectors.shape[1]].sum()) / whole if whole else 1.0


@torch.no_grad()
def svd_embedding(experts: Sequence[Expert], dimensions: int | None = 64) -> Embedding:
    """Each expert's coordinates `U S` in the SVD of all experts' Delta-W, flattened and stacked.

    Exact, and without the stack: `U S^2 U^T` is the (E, E) matrix of inner products (classical
    scaling; Torgerson, 1952). Unlike the embedding of arXiv 2405.11157 (`mole_vl.flattened`) it
    takes any ranks and layers, and a rotation in rank space leaves it alone. A column's sign is
    that which makes its largest entry positive. Rows of length 1, as there, are
    `torch.nn.functional.normalize(found.vectors)`.

    Args:
        experts: At least one.
        dimensions: The most coordinates that are kept, of those that are not zero; None for all.

    Raises:
        ValueError: Experts that share a name, a DoRA, a layer that two know in different shapes, or
            fewer than 1 dimension.
    """
    refuse("svd_embedding", [whole_at_least("dimensions", dimensions, 1)])
    products = gram(experts)
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # What is below is rounding, whose directions mean nothing.
    real = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
    kept = min(real, dimensions or real)
    spectrum = values.sqrt()
    places = vectors[:, :kept] * spectrum[:kept]
    largest = places.gather(0, places.abs().argmax(0, keepdim=True)) if kept else places[:1]
    return Embedding(tuple(expert.name for expert in experts), places * largest.sign(), spectrum)
