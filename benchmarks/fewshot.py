"""A new task from a few examples, by mixing a shelf of sixteen experts: all ways side by side.

    python benchmarks/fewshot.py --split dev            # the development tasks
    python benchmarks/fewshot.py --split test           # the held-out tasks
    python benchmarks/fewshot.py --split dev --quick    # one task, few rows, for a look
    python benchmarks/fewshot.py --split test --kept    # the tables of what is measured so far

16 and 64 examples, three draws of each; every way answers the same rows, greedily. A way that
learns nothing is asked once. The unit is the task and draw, its rows averaged; differences are
paired. Cells that were measured are kept, and a run goes on where it stopped; `--part K/N` shares
them among processes. The ways are those of `fewshot_ways.py`; `--ways` names some of them. With
`--kept` nothing is measured, and a way that lacks cells of a size is in none of its tables.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from fewshot_bench import ROWS, Bench, lesson_of, share
from fewshot_ways import FIXED, GATES, LEARNED, STEPS, learned
from text_admission import held_out

from nlp.world.tasks import DEVELOPMENT
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

SHOTS, DRAWS = tuple(STEPS), 3
ASKED = {"dev": 100, "test": None}
Cell = tuple[str, str, int, int]


def cells(split: str, sizes: Sequence[int], quick: bool, ways: Collection[str]) -> list[Cell]:
    """Way, task, examples, draw; those that learn nothing are asked once, as of no examples."""
    tasks = [source.name for source in DEVELOPMENT] if split == "dev" else held_out()
    tasks, draws = tasks[: 1 if quick else None], range(1 if quick else DRAWS)
    lessons = product(sizes, draws, tasks)
    fixed, taught = ([way for way in kind if way in ways] for kind in (FIXED, LEARNED))
    return [
        *((way, task, 0, 0) for task in tasks for way in fixed),
        *((way, task, shots, draw) for shots, draw, task in lessons for way in taught),
    ]


def summary(found: Mapping[Cell, Mapping[str, Any]]) -> list[Measurement]:
    """Exact match and log-likelihood by way, and what the gates gain over each.

    A way is in the tables of the sizes that it was measured at, every task and draw of them.
    """
    measures = {
        "exact match": share,
        "log-likelihood per answer token": lambda one: float(np.mean(one["told"])),
    }
    rows, ways = [], list(dict.fromkeys(way for way, *_ in found))
    for shots in sorted({shots for _, _, shots, _ in found if shots}):
        units = sorted({(t, draw) for _, t, s, draw in found if s == shots})
        arms = [
            way
            for way in ways
            if all((way, t, shots, d) in found or (way, t, 0, 0) in found for t, d in units)
        ]
        for measure, value in measures.items():
            by_arm = {
                arm: [value(found.get((arm, t, shots, d)) or found[arm, t, 0, 0]) for t, d in units]
                for arm in arms
            }
            name = f"{measure}, {shots} examples"
            rows += [measured(name, arm, values) for arm, values in by_arm.items()]
            rows += [
                measured(name, f"{GATES} - {arm}", list(np.subtract(by_arm[GATES], values)))
                for arm, values in by_arm.items()
                if arm != GATES
            ]
            for task in sorted({task for task, _ in units}):
                rows += [
                    measured(
                        f"{name}, {task}",
                        arm,
                        [v for v, (own, _) in zip(values, units, strict=True) if own == task],
                    )
                    for arm, values in by_arm.items()
                ]
        for arm in arms:
            mine = [one for (a, _, s, _), one in found.items() if (a, s) == (arm, shots)]
            spent = [one["seconds"] for one in mine if "seconds" in one]
            if spent:
                rows.append(measured(f"seconds of training, {shots} examples", arm, spent))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--split", choices=tuple(ASKED), default="dev")
    parser.add_argument("--shots", type=int, choices=SHOTS, help="examples; all sizes if not said")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=(*FIXED, *LEARNED),
        help="the gates beside these; if not said, all",
    )
    parser.add_argument("--part", default="1/1", help="the Kth of N processes' cells, as K/N")
    parser.add_argument("--quick", action="store_true", help="one task, few rows, for a look")
    parser.add_argument("--kept", action="store_true", help="summarise; measure nothing")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    sizes = [options.shots] if options.shots else SHOTS[: 1 if options.quick else None]
    asked = 10 if options.quick else ASKED[options.split]
    settings = {"split": options.split, "asked": asked, "rows a step": ROWS}
    name = f"fewshot_{options.split}"
    out = ROOT / "out/benchmarks" / name / ("quick" if options.quick else "full")
    results = out if options.quick else FOLDER
    units = Units(out / "units", results / f"{name}_units.json", settings)
    bench, ways = Bench(out), {0: FIXED, **{shots: learned(shots) for shots in SHOTS}}
    found: dict[Cell, dict[str, Any]] = {}
    wanted = {*(options.ways or (*FIXED, *LEARNED)), GATES}
    for cell in cells(options.split, sizes, options.quick, wanted)[part - 1 :: parts]:
        way, task, shots, draw = cell
        lesson, how = lesson_of(task, shots, draw, asked), ways[shots][way]
        key = f"{way}, {task}, {shots}, {draw}"
        if options.kept and not units.has(key):
            print(f"{key}: not measured yet")
            continue
        found[cell] = units.get(key, partial(how.arm, bench, lesson), how.made)
        units.gather()
        print(f"{key}: {share(found[cell]):.3f}", flush=True)
    if parts > 1:
        return
    made = {
        shots: {way: how.made for way, how in by_name.items() if way in wanted}
        for shots, by_name in ways.items()
        if shots in (0, *sizes)
    }
    settings |= {"ways by examples": made}
    seeds: Sequence[int] = range(DRAWS)
    write_results(name, summary(found), settings=settings, seeds=seeds, folder=results)


if __name__ == "__main__":
    main()
