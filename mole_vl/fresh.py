"""New experts, as LoRAs start: A drawn at random, B zero."""

import math
from collections.abc import Mapping
from zlib import crc32

import torch
from torch import nn

from mole_vl.experts import Expert, Factors
from mole_vl.faults import at_least, positive, refuse


def fresh_expert(
    name: str, layers: Mapping[str, tuple[int, ...]], *, rank: int, scale: float, seed: int = 0
) -> Expert:
    """An expert that changes nothing yet (LoRA, arXiv 2106.09685, section 4.1).

    A starts as torch's linear layers do, from a generator of the expert's name and the layer's
    path; B is zero.

    Args:
        name: The expert's.
        layers: Shape of the weight of each layer that it is to change, by path
            (`mole_vl.layers.layer_shapes`).
        rank: Of every layer.
        scale: The update is `scale * B A`: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        seed: Of the start.

    Raises:
        ValueError: A rank below 1, or a scale that is no positive number.
    """
    refuse(
        f"fresh expert {name!r}",
        [at_least("rank", rank, 1), positive("scale", scale), at_least("seed", seed, 0)],
    )
    factors = {}
    for path, (out, *reads) in layers.items():
        generator = torch.Generator().manual_seed(crc32(f"{name} {path}".encode()) + seed)
        a = torch.empty(rank, *reads)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        factors[path] = Factors(a, torch.zeros(out, rank), scale)
    return Expert(name, factors)
