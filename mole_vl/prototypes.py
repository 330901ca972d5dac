"""Arrow's prototypes of one expert: what a library keeps of it (arXiv 2405.11157)."""

import torch
from torch import Tensor

from mole_vl.experts import Expert
from mole_vl.lowrank import top_input


@torch.no_grad()
def prototypes_of(expert: Expert) -> dict[str, Tensor]:
    """The input direction that each of an expert's layers amplifies most, (in,) by path, in fp32.

    That is the top right singular vector of Delta-W (of a DoRA, of its low-rank part, as the gate
    `Arrow` has it), of length 1; its sign means nothing. Layers whose update is zero have none, nor
    have convolutions, which mix positions.
    """
    found = {}
    for path, factors in expert.layers.items():
        single = all(size == 1 for size in factors.shape[2:])
        direction = top_input(factors.b, factors.a.flatten(1)) if single and factors.scale else None
        if direction is not None:
            found[path] = direction.float()
    return found
