"""What the few-shot preset's choices are worth, on development tasks alone.

    python benchmarks/fewshot_ablation.py            # all; --part K/N for one of N processes
    python benchmarks/fewshot_ablation.py --quick    # one task, few rows, for a look

Four tasks of the shelf asked as the held-out ones are, each without its own expert: 16 examples,
two draws (one for some), 100 rows asked. The unit is the task and draw; differences to the first
are paired. Of the committed cells 84 were made on an H100, the others on a CPU, all in bf16.
"""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from fewshot_bench import ROWS, Bench, Gates, lesson_of, share

from mole_vl.gates import Free, Hidden, MoLE, ScaledSoftmax
from nlp.world.tasks import DEVELOPMENT
from results import FOLDER, ROOT, measured, write_results
from units import Units

SHOTS, DRAWS, ASKED = 16, 2, 100
FREE, HIDDEN = MoLE(score=Free()), MoLE(score=Hidden())
PRESET = Gates(HIDDEN, "block", lr=5e-3)
BY_TOKEN = replace(PRESET, gate=MoLE(over="position"))
XLORA = Gates(MoLE(over="position"), "network", lr=5e-3, after=10)
VARIANTS: dict[str, Gates] = {
    "hidden, block": PRESET,
    "hidden, block, lr 2e-2": replace(PRESET, lr=2e-2),
    "hidden, layer": replace(PRESET, site="layer"),
    "hidden, network, preview 24": replace(PRESET, site="preview", after=24),
    "hidden, block, total 2": replace(PRESET, gate=MoLE(normaliser=ScaledSoftmax(total=2.0))),
    "hidden, block, by token": BY_TOKEN,
    "hidden, block, by token, total 2": replace(
        BY_TOKEN, gate=MoLE(normaliser=ScaledSoftmax(total=2.0), over="position")
    ),
    "hidden, matrix, by token": replace(BY_TOKEN, site="matrix"),
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
"""Those that were asked for one draw, to see which way it goes."""


SETTINGS = {"shots": SHOTS, "asked": ASKED, "rows a step": ROWS}


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
    draws = range(1 if options.quick else DRAWS)
    cells = [
        (variant, task, draw)
        for draw in draws
        for variant in (*VARIANTS, *(() if draw else ON_ONE_DRAW))
        for task in tasks
    ]
    bench, ways = Bench(out), VARIANTS | ON_ONE_DRAW
    found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for variant, task, draw in cells[part - 1 :: parts]:
        lesson, how = lesson_of(task, SHOTS, draw, 10 if options.quick else ASKED), ways[variant]
        key = f"{variant}, {task}, {draw}"
        one = units.get(key, partial(how, bench, lesson), how.settings())
        units.gather()
        found.setdefault(variant, {})[task, draw] = one
        print(f"{key}: {share(one):.3f}, {np.mean(one['told']):.3f}", flush=True)
    if parts > 1:
        return
    rows = []
    measures = {
        "exact match": share,
        "log-likelihood per answer token": lambda one: float(np.mean(one["told"])),
    }
    (_, first), *_ = found.items()
    for measure, value in measures.items():
        rows += [measured(measure, v, list(map(value, own.values()))) for v, own in found.items()]
        rows += [
            measured(
                measure,
                f"{variant} - {next(iter(found))}",
                [value(one) - value(first[unit]) for unit, one in own.items()],
            )
            for variant, own in found.items()
            if own is not first
        ]
    settings = SETTINGS | {"variants": {name: how.settings() for name, how in ways.items()}}
    write_results("fewshot_ablation", rows, settings=settings, seeds=list(draws), folder=results)


if __name__ == "__main__":
    main()
