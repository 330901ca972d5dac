"""What X-LoRA costs: peft's class, which runs the model twice, beside one pass.

    python benchmarks/xlora_cost.py            # --quick: one task, few steps and rows, for a look

Both learn 16 examples of a development task (40 steps of 16 rows), over the shelf without the
task's own expert, then answer 100 rows greedily; three draws. The first pass of peft's class runs
every adapter, times zero; it keeps no cache, so that every new token reads the whole prompt twice.
The unit is the task and draw, the two sides measured one after the other.
"""

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
from fewshot_ablation import PRESET, XLORA
from fewshot_bench import ROWS, Bench, lesson_of
from fewshot_peers import XLora

from nlp.world.tasks import DEVELOPMENT
from results import FOLDER, ROOT, measured, write_results
from units import Units

SHOTS, DRAWS, ASKED = 16, 3, 100
PEFT, OURS = "peft, two passes", "one pass"
MEASURES = {"seconds of training": "seconds", "seconds of answering": "asking"}


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one task, for a look")
    options = parser.parse_args()
    out = ROOT / "out/benchmarks/xlora_cost" / ("quick" if options.quick else "full")
    results = out if options.quick else FOLDER
    steps, asked = (2, 10) if options.quick else (PRESET.steps, ASKED)
    settings = {"shots": SHOTS, "asked": asked, "steps": steps, "rows a step": ROWS}
    units = Units(out / "units", results / "xlora_cost_units.json", settings)
    sides = {
        PEFT: XLora(steps=steps),
        OURS: replace(XLORA, steps=steps),
    }
    bench, found = Bench(out), {side: [] for side in sides}
    for task in [source.name for source in DEVELOPMENT][: 1 if options.quick else None]:
        for draw in range(1 if options.quick else DRAWS):
            lesson = lesson_of(task, SHOTS, draw, asked)
            for side, arm in sides.items():
                key = f"{side}, {task}, {draw}"
                found[side].append(units.get(key, partial(arm, bench, lesson)))
                units.gather()
                print(key, {m: round(found[side][-1][m], 1) for m in MEASURES.values()}, flush=True)
    rows = []
    for measure, key in MEASURES.items():
        spent = {side: [one[key] for one in cells] for side, cells in found.items()}
        rows += [measured(measure, side, values) for side, values in spent.items()]
        ratio = np.divide(spent[PEFT], spent[OURS]).tolist()
        rows.append(measured(measure, f"{PEFT} / {OURS}", ratio))
    write_results("xlora_cost", rows, settings=settings, seeds=range(DRAWS), folder=results)


if __name__ == "__main__":
    main()
