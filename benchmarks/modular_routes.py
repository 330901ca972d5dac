"""A private library on the mixed stream, no task named: every route of `mole evaluate`, and gates.

    python benchmarks/modular_routes.py            # --quick: two rows a task, short training

The libraries are those of `modular_library.py`, one for each of three seeds, of sixteen experts of
rank 4. Routes are those of `nlp.routes`: uniform; Arrow (top 4); PHATGOOSE (top 2), each gate
trained alone for 100 steps of 8 rows of its expert's own task; the nearest centroid of the base's
states; a classifier's shares; the task predictor, its likeliest expert alone. Centroids and
classifier are made from the stream's training rows, `shelf_train`, and so are the MoLE gates, of
states and sentences and of states alone, which learn as in `mixed_stream.py`. The oracle asks each
row's own expert. Beside them stand the base, and the clusters' experts by the classifier and the
one shared LoRA of the same seeds, as `modular_library.py` measured them. The same 400 held-out rows
for all; the unit is the row, in the mean over seeds.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fewshot_bench import WORLD, Bench, Lesson, share
from fewshot_ways import untouched
from mixed_stream import GATES, LEARNED, STATES, Learned, beside_gates, oracle
from modular_library import (
    ASKED,
    DATA,
    MBC,
    NAME as LIBRARY,
    SEEDS,
    SHARED,
    STEPS,
    TASKS,
    Lab,
    experts_in,
)

from mole_vl.files import check_file
from mole_vl.library import ExpertLibrary
from mole_vl.specs import to_data
from mole_vl.training import FitConfig
from nlp.data import TextRow, read_rows, write_rows
from nlp.library_transforms import (
    CentroidsConfig,
    ClassifierConfig,
    PhatgooseLibraryConfig,
    centroids,
    classifier,
    phatgoose,
)
from nlp.mixed_text import ORACLE, first_of_each
from nlp.routes import RouteConfig, routed
from nlp.shelf import open_shelf
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

NAME = "modular_routes"
ROUTES: Mapping[str, Mapping[str, Any]] = {
    "uniform": {"route": "uniform"},
    "Arrow": {"route": "arrow", "top_k": 4},
    "PHATGOOSE": {"route": "phatgoose"},
    "nearest centroid": {"route": "nearest"},
    "classifier": {"route": "classifier"},
    "task predictor": {"route": "task_predictor"},
}
KEPT = {f"{MBC}, task predictor": (MBC, "guessed"), SHARED: (SHARED, "told")}
Way = Callable[[], dict[str, Any]]
"""Answers every row."""


def by_task(rows: Sequence[TextRow], folder: Path) -> dict[str, Path]:
    """A file of each task's rows, by task."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {task: folder / f"{task}.jsonl" for task in TASKS}
    for task, file in files.items():
        write_rows(file, [row for row in rows if row.task == task])
    return files


@dataclass(frozen=True)
class Kit:
    """What the ways to answer from every seed's library are made from.

    Args:
        out: Where what they learn lies.
        lesson: The stream's training rows, and those that are asked.
        alone: Steps of each of PHATGOOSE's gates.
        learned: How MoLE gates learn, by arm.
    """

    out: Path
    lesson: Lesson
    alone: int
    learned: Mapping[str, Learned]

    def routers(self, address: str, seed: int) -> Path:
        """Centroids, PHATGOOSE's gates and a classifier, where they are missing; the classifier."""
        stream, folder = by_task(self.lesson.few, self.out / "stream"), self.out / "classifier"
        if not folder.exists():
            classifier(ClassifierConfig(library=address, data=stream, output=folder))
        centroids(CentroidsConfig(library=address, data=stream))
        fit = FitConfig(
            output=self.out / f"phatgoose, {seed}",
            steps=self.alone,
            rows=8,
            lr=1e-3,
            seed=seed,
            save_every=25,
            progress=False,
        )
        phatgoose(PhatgooseLibraryConfig(library=address, data=DATA, fit=fit, limit=None))
        return folder

    def ways(self, library: ExpertLibrary, seed: int) -> dict[str, tuple[Way, Mapping[str, Any]]]:
        """Each way to answer from a library, and how it is made."""
        guide, lesson = self.routers(library.address, seed), self.lesson
        bench = Bench(self.out, experts_in(library))
        routes = {
            name: (
                partial(by_route, bench, lesson.asked, _route(library.address, guide, told_of)),
                told_of,
            )
            for name, told_of in ROUTES.items()
        }
        gates = {
            arm: (partial(how, bench, lesson, self.out / f"{arm}, {seed}", seed), to_data(how))
            for arm, how in self.learned.items()
        }
        return {
            "base": (partial(untouched, bench, lesson), {}),
            **routes,
            **gates,
            ORACLE: (partial(oracle, bench, lesson), {}),
        }


def by_route(bench: Bench, asked: Sequence[TextRow], config: RouteConfig) -> dict[str, Any]:
    """What a library answers under a route."""
    mixture, around = routed(bench.model, bench.tokenizer, open_shelf(config), config)
    found = bench.judge(asked, around=around)
    mixture.unmix()
    return found


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Measurement]:
    """Exact match of each way, its ratio to the oracle, what the gates gain, and likelihood.

    Args:
        found: By way, of each seed.
    """
    hits = {way: np.mean([one["hits"] for one in cells], 0) for way, cells in found.items()}
    rows = beside_gates(hits)
    for way, cells in found.items():
        told = np.mean([one["told"] for one in cells], 0)
        rows.append(measured("log-likelihood per answer token", way, told.tolist()))
        shares = [share(one) for one in cells]
        rows.append(measured("exact match of a seed", way, shares))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few rows and steps, for a look")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, help="make these alone")
    options = parser.parse_args()
    kind = "quick" if options.quick else "full"
    out = ROOT / "out/benchmarks" / NAME / kind
    libraries, folder = ROOT / "out/benchmarks" / LIBRARY / kind, out if options.quick else FOLDER
    asked = first_of_each(read_rows(WORLD / "data/shelf_test.jsonl"), 2 if options.quick else ASKED)
    train = first_of_each(read_rows(WORLD / "data/shelf_train.jsonl"), 4 if options.quick else None)
    learned = {arm: LEARNED[arm] for arm in (STATES, GATES)}
    if options.quick:
        learned = {a: replace(how, steps=2, rows=4, centring=1) for a, how in learned.items()}
    kit = Kit(out, Lesson("", train, asked), 1 if options.quick else 100, learned)
    settings = {"asked": len(asked), "rows of the stream learned": len(train)}
    units = Units(out / "units", folder / f"{NAME}_units.json", settings)
    seeds = SEEDS[:1] if options.quick else SEEDS
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds or seeds:
        library = Lab(libraries, 1 if options.quick else STEPS).private(seed)
        for way, (make, own) in kit.ways(library, seed).items():
            one = units.get(f"{way}, {seed}", make, own)
            found.setdefault(way, []).append(one)
            units.gather()
            print(f"{way}, {seed}: {share(one):.3f}", flush=True)
    if options.seeds:
        return
    others = (libraries if options.quick else FOLDER) / f"{LIBRARY}_units.json"
    check_file("the other arms", others, "what python benchmarks/modular_library.py measured")
    kept = json.loads(others.read_text())["units"]
    for way, (arm, how) in KEPT.items():
        found[way] = [kept[f"{arm}, {seed}"]["found"][how] for seed in seeds]
    write_results(NAME, summary(found), settings=settings, seeds=seeds, folder=folder)


def _route(address: str, guide: Path, told_of: Mapping[str, Any]) -> RouteConfig:
    reads: dict[str, Any] = (
        {"classifier": guide} if told_of["route"] in ("classifier", "task_predictor") else {}
    )
    return RouteConfig(library=address, batch_rows=50, **told_of, **reads)


if __name__ == "__main__":
    main()
