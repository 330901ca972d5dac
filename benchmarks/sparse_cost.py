"""What a layer of many experts costs: time follows how many a position has, not how many there are.

    python benchmarks/sparse_cost.py            # --quick: few repetitions, for a look

One linear layer of width 1,024, experts of rank 8 that learn, 2,048 positions of two experts each,
whose scores are given; forward and backward, fp32. The numbers of experts take turns, twenty times;
the unit is one turn.
"""

import argparse
from functools import partial

import torch
from costs import in_turns
from torch import nn

from mole_vl.experts import Factors
from mole_vl.layers import Chosen, MixtureLinear
from mole_vl.stack import Learning
from results import ROOT, write_results

WIDTH, POSITIONS, TOP_K, RANK = 1024, 2048, 2, 8
EXPERTS = (8, 64, 512)


def layer_of(experts: int) -> MixtureLinear:
    """A layer whose positions have two experts each, drawn at random."""
    generator = torch.Generator().manual_seed(experts)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factors = [Factors(normal(RANK, WIDTH), normal(WIDTH, RANK), 1.0) for _ in range(experts)]
    chosen = torch.rand(1, POSITIONS, experts, generator=generator).argsort(-1)[..., :TOP_K]
    weights = normal(1, POSITIONS, TOP_K).softmax(-1).requires_grad_()
    base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    return MixtureLinear("layer", base, factors, lambda _: Chosen(weights, chosen), Learning())


def turn(layer: MixtureLinear, x: torch.Tensor) -> None:
    """A forward and its backward."""
    layer(x).square().sum().backward()
    layer.zero_grad()
    x.grad = None


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few repetitions, for a look")
    turns = 3 if parser.parse_args().quick else 20
    torch.manual_seed(0)
    x = torch.randn(1, POSITIONS, WIDTH, requires_grad=True)
    sides = {f"E = {experts}": partial(turn, layer_of(experts), x) for experts in EXPERTS}
    first, *others = sides
    rows = in_turns("one layer", sides, turns, [(other, first) for other in others])
    settings = {
        "width": WIDTH, "positions": POSITIONS, "top k": TOP_K, "rank": RANK, "turns": turns,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    quick = {"folder": ROOT / "out/benchmarks/sparse_cost"} if turns < 20 else {}
    write_results("sparse_cost", rows, settings=settings, seeds=[0], **quick)


if __name__ == "__main__":
    main()
