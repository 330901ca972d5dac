"""New experts, as LoRAs start: A drawn at random, B zero."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import nn

from mole_vl.experts import Expert, Factors
from mole_vl.faults import at_least, positive, refuse


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form of a LoRA.

    Args:
        rank: Of each factor pair.
        alpha: The product B A counts alpha / rank times, or alpha / sqrt(rank) for rsLoRA.
        rslora: Whether it is an rsLoRA (arXiv 2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False

    def __post_init__(self) -> None:
        refuse("Form", [at_least("rank", self.rank, 1), positive("alpha", self.alpha)])

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def fresh_expert(
    name: str, layers: Mapping[str, tuple[tuple[int, ...], Form]], *, seed: int = 0
) -> Expert:
    """An expert that changes nothing yet (LoRA, arXiv 2106.09685, section 4.1).

    A starts as torch's linear layers do, drawn for the expert's name and the layer's path; B is
    zero.

    Args:
        name: The expert's.
        layers: Shape of the weight of each layer that it is to change (as
            `mole_vl.layers.layer_shapes` tells), and the form of its factors, by path.
        seed: Of the start.
    """
    factors = {}
    for path, ((out, *reads), form) in layers.items():
        generator = torch.Generator().manual_seed(crc32(f"{name} {path}".encode()) + seed)
        a = torch.empty(form.rank, *reads)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        factors[path] = Factors(a, torch.zeros(out, form.rank), form.scale)
    return Expert(name, factors)
