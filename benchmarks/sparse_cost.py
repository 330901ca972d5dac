"""What a layer of many experts costs: time follows how many a position has, not how many there are.

    python benchmarks/sparse_cost.py            # --quick: few repetitions, for a look

One linear layer of width 1,024, experts of rank 8 that learn, 2,048 positions of two experts each,
whose scores are given; forward and backward, fp32. The numbers of experts take turns, twenty times;
the unit is one turn.
"""

import argparse

import numpy as np
import torch
from costs import clocks
from torch import nn

from mole_vl.experts import Factors
from mole_vl.layers import Chosen, Learning, MixtureLinear
from results import ROOT, measured, write_results

WIDTH, POSITIONS, TOP_K, RANK = 1024, 2048, 2, 8
EXPERTS, FIRST = (8, 64, 512), 8


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


def turn(layer: MixtureLinear, x: torch.Tensor) -> float:
    """Seconds of a forward and its backward."""
    start = clocks()
    layer(x).square().sum().backward()
    spent = clocks() - start
    layer.zero_grad()
    x.grad = None
    return float(spent[0])


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few repetitions, for a look")
    turns = 3 if parser.parse_args().quick else 20
    torch.manual_seed(0)
    x = torch.randn(1, POSITIONS, WIDTH, requires_grad=True)
    layers = {experts: layer_of(experts) for experts in EXPERTS}
    for layer in layers.values():
        turn(layer, x)
    spent = {experts: [0.0] * turns for experts in EXPERTS}
    for place in range(turns):
        for experts, layer in layers.items():
            spent[experts][place] = turn(layer, x)
    measure = "seconds, median"
    rows = [measured(measure, f"E = {e}", own, centre=np.median) for e, own in spent.items()]
    for experts in EXPERTS[1:]:
        ratio = np.divide(spent[experts], spent[FIRST]).tolist()
        rows.append(measured(measure, f"E = {experts} / E = {FIRST}", ratio, centre=np.median))
    settings = {
        "width": WIDTH, "positions": POSITIONS, "top k": TOP_K, "rank": RANK, "turns": turns,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    quick = {"folder": ROOT / "out/benchmarks/sparse_cost"} if turns < 20 else {}
    write_results("sparse_cost", rows, settings=settings, seeds=[0], **quick)


if __name__ == "__main__":
    main()
