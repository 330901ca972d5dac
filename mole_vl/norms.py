"""How large experts are, layer by layer: what a sum of unequal LoRAs is ruled by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_vl.experts import Expert
from mole_vl.similarity import grams_by_layer


@dataclass(frozen=True)
class UpdateNorms:
    """Frobenius norms of the experts' Delta-W.

    Args:
        names: The experts in order.
        by_layer: Norm of each expert's update at each layer, (E,), by the layer's path; 0 where it
            leaves the layer alone.
    """

    names: tuple[str, ...]
    by_layer: Mapping[str, Tensor]

    @property
    def total(self) -> Tensor:
        """Norm of each expert's update over all layers, (E,)."""
        return torch.stack(list(self.by_layer.values())).square().sum(0).sqrt()

    @property
    def relative(self) -> Tensor:
        """Each expert's norm over the experts' mean, (E,): 1 for all where they are of one size."""
        mean = self.total.mean()
        return self.total / torch.where(mean > 0, mean, 1.0)


def update_norms(experts: Sequence[Expert]) -> UpdateNorms:
    """The Frobenius norm of every expert's Delta-W at every layer, from its r x r cores.

    Args:
        experts: At least one; ranks, alphas and layers may differ.

    Raises:
        ValueError: Experts that share a name, a DoRA, or a layer that two know in different shapes.
    """
    grams = grams_by_layer(experts)
    return UpdateNorms(
        tuple(expert.name for expert in experts),
        # Rounding may leave a sum of squares that is zero a little below it.
        {path: products.diagonal().clamp_min(0).sqrt() for path, products in grams.items()},
    )
