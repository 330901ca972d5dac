"""Experts for the tests of libraries: of mixed ranks, scales and targets."""

import torch

from mole_vl import Expert, Factors

RANKS = {"past": (2, 5), "plural": (1,), "french": (3, 3, 7), "german": (4,)}


def expert(name, seed=0, dtype=torch.float32):
    chance = torch.Generator().manual_seed(seed)
    layers = {}
    for number, rank in enumerate(RANKS.get(name, (2, 3))):
        a = torch.randn(rank, 8, generator=chance).to(dtype)
        b = torch.randn(6, rank, generator=chance).to(dtype)
        layers[f"layers.{number + seed % 2}.q"] = Factors(a, b, 0.25 * (number + 1))
    return Expert(name, layers, base="toy")


def same(first, second):
    """Whether two experts do the same, to the bit."""
    return first.layers.keys() == second.layers.keys() and all(
        torch.equal(factors.a, second.layers[path].a)
        and torch.equal(factors.b, second.layers[path].b)
        and factors.scale == second.layers[path].scale
        for path, factors in first.layers.items()
    )
