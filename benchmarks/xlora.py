"""X-LoRA, by quality and cost: peft's class, which runs the model twice, beside one pass.

    python benchmarks/xlora.py            # --quick: one task, few steps and rows, for a look

All learn 16 examples of a development task (40 steps of 16 rows), over the shelf without the task's
own expert, then answer 100 rows greedily; one draw of each of the four tasks. The first pass of
peft's class runs every adapter, times zero; it keeps no cache, so that every new token reads the
whole prompt twice. Its learning rate is that of the authors' example of training, and the one that
our gates have: the better of the two here is what `fewshot.py` asks. The unit is the task, the
sides measured one after the other.
"""

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
from fewshot_ablation import PRESET, XLORA
from fewshot_bench import ROWS, Bench, lesson_of, share
from fewshot_peers import XLora

from nlp.world.tasks import DEVELOPMENT
from results import FOLDER, ROOT, measured, write_results
from units import Units

SHOTS, DRAWS, ASKED = 16, 1, 100
PEFT, OURS = "peft, two passes", "one pass"
COSTS = {"seconds of training": "seconds", "seconds of answering": "asking"}


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one task, for a look")
    options = parser.parse_args()
    out = ROOT / "out/benchmarks/xlora" / ("quick" if options.quick else "full")
    results = out if options.quick else FOLDER
    steps, asked = (2, 10) if options.quick else (PRESET.steps, ASKED)
    settings = {"shots": SHOTS, "asked": asked, "steps": steps, "rows a step": ROWS}
    units = Units(out / "units", results / "xlora_units.json", settings)
    rates = {f"{PEFT}, lr {lr}": XLora(lr=lr, steps=steps) for lr in (1e-4, XLORA.lr)}
    sides = {OURS: replace(XLORA, steps=steps), **rates}
    bench, found = Bench(out), {side: [] for side in sides}
    for task in [source.name for source in DEVELOPMENT][: 1 if options.quick else None]:
        for draw in range(1 if options.quick else DRAWS):
            lesson = lesson_of(task, SHOTS, draw, asked)
            for side, arm in sides.items():
                key = f"{side}, {task}, {draw}"
                one = units.get(key, partial(arm, bench, lesson))
                found[side].append(one)
                units.gather()
                spent = {cost: round(one[cost], 1) for cost in COSTS.values()}
                print(key, f"{share(one):.3f}", spent, flush=True)
    measures = {
        "exact match": share,
        "log-likelihood per answer token": lambda one: float(np.mean(one["told"])),
    }
    rows = []
    for measure, value in measures.items():
        by_side = {side: [value(one) for one in cells] for side, cells in found.items()}
        rows += [measured(measure, side, values) for side, values in by_side.items()]
        for side in rates:
            gain = np.subtract(by_side[OURS], by_side[side]).tolist()
            rows.append(measured(measure, f"{OURS} - {side}", gain))
    for measure, key in COSTS.items():
        by_side = {side: [one[key] for one in cells] for side, cells in found.items()}
        rows += [measured(measure, side, values) for side, values in by_side.items()]
        for side in rates:
            ratio = np.divide(by_side[side], by_side[OURS]).tolist()
            rows.append(measured(measure, f"{side} / {OURS}", ratio))
    write_results("xlora", rows, settings=settings, seeds=range(DRAWS), folder=results)


if __name__ == "__main__":
    main()
