"""Experts of mixed ranks, alphas and layers, and what they are densely."""

import math

import torch

from mole_vl import Expert, Factors

SHAPES = {"q": (7, 5), "k": (4, 5), "v": (3, 6), "conv": (4, 2, 3, 3)}
NAMES = ("ann", "bob", "cyd", "dan", "eve")


def drawn(seed=0, names=NAMES, shapes=SHAPES, full=False):
    """An expert for each name; all but the first leave some layers alone, and ranks differ.

    With `full` each changes every layer, at its full rank.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    experts = []
    for place, name in enumerate(names):
        layers = {}
        for path, (out, *rest) in shapes.items():
            if place and not full and number(0, 2) == 0:
                continue
            rank = min(out, math.prod(rest)) if full else number(1, 4)
            alpha = number(1, 32)
            # Plain LoRA and rsLoRA, by turns.
            scale = alpha / rank if number(0, 1) else alpha / rank**0.5
            a = torch.randn(rank, *rest, generator=generator)
            b = torch.randn(out, rank, generator=generator)
            layers[path] = Factors(a, b, scale)
        if not layers:
            layers = {"q": Factors(torch.ones(1, 5), torch.ones(7, 1), 1.0)}
        experts.append(Expert(name, layers))
    return experts


def flat(experts, paths=None):
    """Every expert's Delta-W, flattened, one after the other, as rows in fp64."""
    paths = paths or sorted({path for one in experts for path in one.layers})
    shapes = {path: own.shape for one in experts for path, own in one.layers.items()}

    def dense(one, path):
        if path not in one.layers:
            return torch.zeros(shapes[path], dtype=torch.float64).flatten()
        own = one.layers[path]
        return (own.scale * own.b.double() @ own.a.double().flatten(1)).flatten()

    return torch.stack([torch.cat([dense(one, path) for path in paths]) for one in experts])


def turned(experts, orthogonal=True, seed=9):
    """The same updates, written otherwise: (R A, B R^-1) for a random R at each layer."""
    generator = torch.Generator().manual_seed(seed)

    def turn(own):
        r = torch.randn(own.rank, own.rank, generator=generator, dtype=torch.float64)
        if orthogonal:
            r = torch.linalg.qr(r)[0]
        else:  # Well within what can be inverted.
            r = r + 3 * own.rank * torch.eye(own.rank, dtype=torch.float64)
        a = torch.tensordot(r, own.a.double(), 1)
        return Factors(a, own.b.double() @ torch.linalg.inv(r), own.scale)

    return [Expert(one.name, {p: turn(own) for p, own in one.layers.items()}) for one in experts]
