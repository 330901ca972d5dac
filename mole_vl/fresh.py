"""New experts, as LoRAs start: A drawn at random, B zero."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import nn

from mole_vl.dora import row_norms
from mole_vl.experts import Expert, Factors
from mole_vl.faults import at_least, positive, refuse
from mole_vl.layers import layer_shapes


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form of a LoRA.

    Args:
        rank: Of each factor pair.
        alpha: The product B A counts alpha / rank times, or alpha / sqrt(rank) for rsLoRA.
        rslora: Whether it is an rsLoRA (arXiv 2312.03732).
        dora: Whether it is a DoRA (arXiv 2402.09353): it learns the norms of the base's rows too.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        refuse("Form", [at_least("rank", self.rank, 1), positive("alpha", self.alpha)])

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def fresh_expert(
    name: str, model: nn.Module, forms: Mapping[str, Form], *, seed: int = 0
) -> Expert:
    """An expert that changes nothing yet (LoRA, arXiv 2106.09685, section 4.1).

    A starts as torch's linear layers do, drawn for the expert's name and the layer's path; B is
    zero.

    Args:
        name: The expert's.
        model: The model whose layers it is to change.
        forms: The form of the factors of each of them, by path.
        seed: Of the start.
    """
    factors, shapes = {}, layer_shapes(model)
    for path, form in forms.items():
        out, *reads = shapes[path]
        generator = torch.Generator().manual_seed(crc32(f"{name} {path}".encode()) + seed)
        a = torch.empty(form.rank, *reads)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        # B is zero: the changed weight's norms are the base's own.
        norms = row_norms(model.get_submodule(path), reads[0]).cpu() if form.dora else None
        factors[path] = Factors(a, torch.zeros(out, form.rank), form.scale, norms)
    return Expert(name, factors)
