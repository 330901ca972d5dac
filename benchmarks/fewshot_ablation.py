"""What the few-shot preset's choices are worth, on development tasks alone.

    python benchmarks/fewshot_ablation.py            # all; --part K/N for one of N processes
    python benchmarks/fewshot_ablation.py --quick    # one task, few rows, for a look

Four tasks of the shelf asked as the held-out ones are, each without its own expert: 16 examples
(64 for some), two draws (one for some), 100 rows asked. The unit is the task and draw; differences
to the first variant of as many examples are paired. Of the committed cells 84 were made on an H100,
the others on a CPU, all in bf16.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from fewshot_bench import ROWS, Bench, Gates, lesson_of, share

from mole_vl.gates import Free, Hidden, MoLE, ScaledSoftmax
from nlp.world.tasks import DEVELOPMENT
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

ASKED = 100
FREE, HIDDEN = MoLE(score=Free()), MoLE(score=Hidden())
START = Gates(HIDDEN, "block", lr=5e-3)
BY_TOKEN = replace(START, gate=MoLE(over="position"))
PRESET = replace(BY_TOKEN, site="matrix")
"""What was chosen here, and asked of the held-out tasks."""
XLORA = Gates(MoLE(over="position"), "network", lr=5e-3, after=10)
VARIANTS: dict[str, Gates] = {
    "hidden, block": START,
    "hidden, block, lr 2e-2": replace(START, lr=2e-2),
    "hidden, layer": replace(START, site="layer"),
    "hidden, network, preview 24": replace(START, site="preview", after=24),
    "hidden, block, total 2": replace(START, gate=MoLE(normaliser=ScaledSoftmax(total=2.0))),
    "hidden, block, by token": BY_TOKEN,
    "hidden, block, by token, total 2": replace(
        BY_TOKEN, gate=MoLE(normaliser=ScaledSoftmax(total=2.0), over="position")
    ),
    "hidden, matrix, by token": PRESET,
    "hidden, matrix, by token, total 2": replace(
        BY_TOKEN, gate=MoLE(normaliser=ScaledSoftmax(total=2.0), over="position"), site="matrix"
    ),
    "free, network": Gates(FREE, "network", lr=1e-1),
    "free, block": Gates(FREE, "block", lr=1e-1),
    "free, block, lr 3e-1": Gates(FREE, "block", lr=3e-1),
    "free, block, total 2": Gates(
        MoLE(score=Free(), normaliser=ScaledSoftmax(total=2.0)), "block", lr=1e-1
    ),
    "free, layer": Gates(FREE, "layer", lr=1e-1),
    "free, matrix": Gates(FREE, "matrix", lr=1e-1),
}
ON_ONE_DRAW: dict[str, Gates] = {
    "hidden, layer, by token": replace(BY_TOKEN, site="layer"),
    "hidden, block, by token, lr 2e-2": replace(BY_TOKEN, lr=2e-2),
    "free, matrix, total 2": Gates(
        MoLE(score=Free(), normaliser=ScaledSoftmax(total=2.0)), "matrix", lr=1e-1
    ),
    "X-LoRA in one pass": XLORA,
    "X-LoRA in one pass, lr 2e-2": replace(XLORA, lr=2e-2),
}
AT_64 = {
    f"hidden, matrix, by token, {steps} steps": replace(PRESET, steps=steps) for steps in (40, 80)
}


@dataclass(frozen=True)
class Group:
    """Variants that are asked alike; one draw shows which way a variant goes."""

    variants: Mapping[str, Gates]
    shots: int = 16
    draws: int = 1


GROUPS = (Group(VARIANTS, draws=2), Group(ON_ONE_DRAW), Group(AT_64, shots=64))
SETTINGS = {"asked": ASKED, "rows a step": ROWS}
Unit = tuple[str, int]
"""Task and draw."""


def summary(
    found: Mapping[int, Mapping[str, Mapping[Unit, Mapping[str, Any]]]],
) -> list[Measurement]:
    """Each variant's figures, and its differences to the first of as many examples."""
    measures = {
        "exact match": share,
        "log-likelihood per answer token": lambda one: float(np.mean(one["told"])),
    }
    rows = []
    for shots, variants in found.items():
        (name, first), *others = variants.items()
        for measure, value in measures.items():
            measure = f"{measure}, {shots} examples"
            rows += [
                measured(measure, v, [value(u) for u in c.values()]) for v, c in variants.items()
            ]
            rows += [
                measured(
                    measure,
                    f"{variant} - {name}",
                    [value(one) - value(first[unit]) for unit, one in own.items()],
                )
                for variant, own in others
            ]
    return rows


def main() -> None:
    """Run the ablation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", default="1/1", help="the Kth of N processes' cells, as K/N")
    parser.add_argument("--quick", action="store_true", help="one task, few rows, for a look")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    out = ROOT / "out/benchmarks/fewshot_ablation" / ("quick" if options.quick else "full")
    results = out if options.quick else FOLDER
    units = Units(out / "units", results / "fewshot_ablation_units.json", SETTINGS)
    tasks = [s.name for s in DEVELOPMENT][: 1 if options.quick else None]
    cells = [
        (variant, how, group.shots, task, draw)
        for group in GROUPS
        for draw in range(1 if options.quick else group.draws)
        for variant, how in group.variants.items()
        for task in tasks
    ]
    bench = Bench(out)
    found: dict[int, dict[str, dict[Unit, dict[str, Any]]]] = {}
    for variant, how, shots, task, draw in cells[part - 1 :: parts]:
        lesson = lesson_of(task, shots, draw, 10 if options.quick else ASKED)
        key = f"{variant}, {shots} examples, {task}, {draw}"
        one = units.get(key, partial(how, bench, lesson), how.settings())
        units.gather()
        found.setdefault(shots, {}).setdefault(variant, {})[task, draw] = one
        print(f"{key}: {share(one):.3f}, {np.mean(one['told']):.3f}", flush=True)
    if parts > 1:
        return
    ways = {name: how.settings() for group in GROUPS for name, how in group.variants.items()}
    settings, seeds = SETTINGS | {"variants": ways}, range(max(group.draws for group in GROUPS))
    write_results(
        "fewshot_ablation", summary(found), settings=settings, seeds=seeds, folder=results
    )


if __name__ == "__main__":
    main()
