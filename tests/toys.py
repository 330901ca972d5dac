"""Tiny models and experts for the tests of the core."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mole_vl import Expert, Factors


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context, width, bias=False)

    def forward(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        return self.q(hidden_states) + self.k(context).mean(1, keepdim=True)


class Block(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attention = Attention(width, context)
        self.ff = nn.ModuleList(
            [nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)]
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attention(hidden_states=x, context=context).tanh()
        y = x
        for part in self.ff:
            y = part(y)
        return x + y


class Toy(nn.Module):
    """Two residual blocks between two linear layers; every part mixes or maps positions."""

    def __init__(self, width: int = 6, context: int = 5, blocks: int = 2) -> None:
        super().__init__()
        self.inlet = nn.Linear(3, width)
        self.blocks = nn.ModuleList([Block(width, context) for _ in range(blocks)])
        self.outlet = nn.Linear(width, 4)
        self.checkpointing = False

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.inlet(x)
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.outlet(x)


BLOCKS = {"blocks.0": 6, "blocks.1": 6}
# Every placement of gates, as arguments of `mix`.
SITES = [
    {"site": "matrix"},
    {"site": "layer"},
    {"site": "block"},
    {"site": "network"},
    {"site": "network", "after": 1},
]


def inputs(rows: int = 3, positions: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, positions, 3, generator=generator),
        torch.randn(rows, 2, 5, generator=generator),
    )


def expert(
    name: str, model: nn.Module, paths: list[str], ranks: list[int], seed: int = 0
) -> Expert:
    """An expert with random factors of the given ranks on the given linear layers."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, rank in zip(paths, ranks, strict=True):
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        layers[path] = Factors(
            torch.randn(rank, layer.in_features, generator=generator) / rank,
            torch.randn(layer.out_features, rank, generator=generator),
            scale=0.3 + 0.2 * seed,
        )
    return Expert(name, layers)


def three(model: nn.Module) -> list[Expert]:
    """Three experts of differing ranks, scales and targets."""
    return [
        expert("ann", model, ["blocks.0.attention.q", "blocks.1.attention.q"], [2, 3], seed=1),
        expert("bob", model, ["blocks.0.attention.q", "blocks.0.attention.k"], [1, 4], seed=2),
        expert(
            "cyd",
            model,
            ["blocks.0.ff.0", "blocks.0.ff.2", "blocks.1.attention.q", "blocks.1.attention.k"],
            [2, 2, 5, 1],
            seed=3,
        ),
    ]


def randomise(module: nn.Module, seed: int = 0, size: float = 0.5) -> None:
    """Draw a gate's scores and centres from N(0, size^2): at zero every gate is a merge."""
    generator = torch.Generator().manual_seed(seed)
    centres = [buffer for name, buffer in module.named_buffers() if name.endswith("centre")]
    for tensor in (*module.parameters(), *centres):
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)


def with_constant_weights(
    model: nn.Module, experts: list[Expert], weights: dict[str, float], x, context
):
    """The plain loop: Delta-W of every expert added to the base's weights."""
    changed = {name: p.detach().clone() for name, p in model.named_parameters()}
    for one in experts:
        for path, factors in one.layers.items():
            changed[f"{path}.weight"] += weights[one.name] * factors.delta()
    return functional_call(model, changed, (x, context))
