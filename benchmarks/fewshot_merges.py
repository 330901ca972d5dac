"""How strong, and how dense, peft's merges are in the few-shot benchmark: chosen once, on few rows.

    python benchmarks/fewshot_merges.py            # --quick: one task, for a look

The development tasks' examples (16, three draws) are scored under every merge of the shelf without
the task's own expert; nothing is generated. Each merge is asked in the benchmark with the total
weight and density of the best log-likelihood per answer token in the mean over tasks
(`fewshot_peers.chosen_merges`).

A merge of experts weighed alike grows with the weight and does not change otherwise: peft merges
once for each density, and its adapter is rescaled.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from fewshot_bench import Bench, lesson_of
from fewshot_peers import merges_of
from peft.helpers import rescale_adapter_scale

from merges import KINDS, Kind, PeftMerges
from nlp.answers import log_likelihood
from nlp.data import EncodedRow
from nlp.world.tasks import DEVELOPMENT
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

SHOTS, DRAWS = 16, 3
TOTALS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
DENSITIES = (0.2, 0.5, 0.7)
VARIANTS: list[tuple[Kind, float]] = [
    (kind, density) for kind in KINDS for density in (DENSITIES if "ties" in kind else (1.0,))
]
SETTINGS = {"shots": SHOTS, "draws": DRAWS, "totals": TOTALS}
MEASURE = "log-likelihood per answer token"


def told(
    bench: Bench, merges: PeftMerges, rows: Sequence[EncodedRow], kind: Kind, density: float
) -> list[float]:
    """The rows' mean log-likelihood, by the weights' sum."""
    found = []
    with merges.merged(kind, 1 / len(merges.names), density):
        for total in TOTALS:
            with rescale_adapter_scale(merges.model, total):
                one = log_likelihood(merges.model, bench.tokenizer, rows, batch_rows=50)
            found.append(float(np.mean(one)))
    return found


def of_task(bench: Bench, units: Units, task: str) -> dict[tuple[Kind, float], list[float]]:
    """What a task's examples say of every merge."""
    drawn = (lesson_of(task, SHOTS, draw).few for draw in range(DRAWS))
    rows = bench.encoded(list(dict.fromkeys(row for few in drawn for row in few)))
    found = {}
    with merges_of(bench, task) as merges:
        for kind, density in VARIANTS:
            key = f"{kind}, density {density}, {task}"
            make = partial(told, bench, merges, rows, kind, density)
            found[kind, density] = units.get(key, make)
            units.gather()
            print(key, found[kind, density], flush=True)
    return found


def best(found: Mapping[tuple[Kind, float, float], float]) -> dict[Kind, dict[str, float]]:
    """Each merge's settings of the greatest value, by kind, density and total."""
    chosen = {}
    for kind in KINDS:
        _, density, total = max((key for key in found if key[0] == kind), key=found.__getitem__)
        chosen[kind] = {"total": total, "density": density}
    return chosen


def main() -> None:
    """Run the choice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one task, for a look")
    options = parser.parse_args()
    out = ROOT / "out/benchmarks/fewshot_merges" / ("quick" if options.quick else "full")
    results = out if options.quick else FOLDER
    units = Units(out / "units", results / "fewshot_merges_units.json", SETTINGS)
    tasks = [source.name for source in DEVELOPMENT][: 1 if options.quick else None]
    bench = Bench(out)
    by_task = [of_task(bench, units, task) for task in tasks]
    rows: list[Measurement] = []
    found: dict[tuple[Kind, float, float], float] = {}
    for kind, density in VARIANTS:
        for index, total in enumerate(TOTALS):
            arm = f"{kind}, density {density}, total {total}"
            values = [one[kind, density][index] for one in by_task]
            rows.append(measured(MEASURE, arm, values))
            found[kind, density, total] = rows[-1].mean
    chosen = best(found)
    settings = SETTINGS | {"densities": DENSITIES, "chosen": chosen}
    write_results("fewshot_merges", rows, settings=settings, seeds=range(DRAWS), folder=results)
    print(f"chosen: {chosen}")


if __name__ == "__main__":
    main()
