"""How loud each expert is on each task's rows: does an expert speak up where it is at home?

As the transform of that name in MTTL (the code of arXiv 2405.11157), which draws one other expert
at random for each row; here all are asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_vl.layers import MixtureLinear


@dataclass(frozen=True)
class CrossNorms:
    """Mean norms of the experts' responses `Delta-W x` on each expert's own rows.

    Args:
        names: The experts in order.
        by_layer: By the layer's path, (tasks, E): the mean over the real positions of the rows of
            each expert's task, in the experts' order; 0 where an expert leaves the layer alone.
    """

    names: tuple[str, ...]
    by_layer: Mapping[str, Tensor]

    @property
    def mean(self) -> Tensor:
        """The mean over all layers, (tasks, E)."""
        return torch.stack(list(self.by_layer.values())).mean(0)

    @property
    def relative(self) -> Tensor:
        """An expert's own norm on its rows over the mean of the others', (E,), mean over layers.

        Layers and others that are silent there do not count; NaN where no layer is left.
        """
        norms_LTE = torch.stack(list(self.by_layer.values()))
        own_LT = norms_LTE.diagonal(dim1=1, dim2=2)
        others_LT = norms_LTE.sum(-1) - own_LT
        speaking_LT = (norms_LTE > 0).sum(-1) - (own_LT > 0).long()
        real = (own_LT > 0) & (speaking_LT > 0)
        mean_LT = torch.where(real, others_LT / speaking_LT.clamp_min(1), 1.0)
        ratios_LT = torch.where(real, own_LT / mean_LT, 0.0)
        return ratios_LT.sum(0) / real.sum(0)


@torch.no_grad()
def response_norms(layer: MixtureLinear, x: Tensor) -> Tensor:
    """Norm of each expert's `s_e B_e A_e x`, (..., E) in fp32, without the responses themselves.

    Args:
        layer: A mixture over a linear layer.
        x: What it reads, (..., d).

    Raises:
        ValueError: One of the experts is a DoRA, whose response hangs on the base's.
    """
    if layer.rescaling is not None:
        raise ValueError(f"{layer.path}: a DoRA's response is not its own; leave DoRAs out")
    hidden_R = F.linear(x.float(), layer.reading.float())
    squares_R = (hidden_R @ layer.responses_gram()) * hidden_R
    squares_E = squares_R.new_zeros(*squares_R.shape[:-1], len(layer.ranks))
    squares_E.index_add_(-1, layer.segments, squares_R)
    return squares_E.clamp_min(0).sqrt()
