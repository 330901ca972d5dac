"""A private library on the mixed stream, no task named: every route of `mole evaluate`, and gates.

    python benchmarks/modular_routes.py            # --quick: two rows a task, short training

The library is that of `modular_library.py`'s first seed, sixteen experts of rank 4. Routes are
those of `nlp.routes`: uniform; Arrow (top 4); PHATGOOSE (top 2), each gate trained alone for 100
steps of 8 rows of its expert's own task; the nearest centroid of the base's states; a classifier's
shares; the task predictor, its likeliest expert alone. Centroids and classifier are made from the
stream's training rows, `shelf_train`, and so are the MoLE gates, of states and sentences and of
states alone, which learn as in `mixed_stream.py`. The oracle asks each row's own expert. Beside
them stand the base, and the clusters' experts by the classifier and the one shared LoRA of the same
seed, as `modular_library.py` measured them. The same 400 held-out rows for all; the unit is the
row.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fewshot_bench import WORLD, Bench, Lesson, share
from fewshot_ways import untouched
from mixed_stream import GATES, LEARNED, STATES, beside_gates, oracle
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
SEED = SEEDS[0]


def by_task(rows: Sequence[TextRow], folder: Path) -> dict[str, Path]:
    """A file of each task's rows, by task."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {task: folder / f"{task}.jsonl" for task in TASKS}
    for task, file in files.items():
        write_rows(file, [row for row in rows if row.task == task])
    return files


def make_routers(address: str, stream: Mapping[str, Path], out: Path, steps: int) -> Path:
    """Centroids, PHATGOOSE's gates and a classifier, where they are missing; the classifier."""
    folder = out / "classifier"
    if not folder.exists():
        classifier(ClassifierConfig(library=address, data=stream, output=folder))
    centroids(CentroidsConfig(library=address, data=stream))
    alone = FitConfig(
        output=out / "phatgoose", steps=steps, rows=8, lr=1e-3, save_every=25, progress=False
    )
    phatgoose(PhatgooseLibraryConfig(library=address, data=DATA, fit=alone, limit=None))
    return folder


def by_route(bench: Bench, asked: Sequence[TextRow], config: RouteConfig) -> dict[str, Any]:
    """What a library answers under a route."""
    mixture, around = routed(bench.model, bench.tokenizer, open_shelf(config), config)
    found = bench.judge(asked, around=around)
    mixture.unmix()
    return found


def summary(found: Mapping[str, Mapping[str, Any]]) -> list[Measurement]:
    """Exact match of each way, its ratio to the oracle, what the gates gain, and likelihood."""
    hits = {way: np.array(one["hits"], dtype=float) for way, one in found.items()}
    return beside_gates(hits) + [
        measured("log-likelihood per answer token", way, one["told"]) for way, one in found.items()
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few rows and steps, for a look")
    options = parser.parse_args()
    kind = "quick" if options.quick else "full"
    out = ROOT / "out/benchmarks" / NAME / kind
    libraries, folder = ROOT / "out/benchmarks" / LIBRARY / kind, out if options.quick else FOLDER
    library = Lab(libraries, 1 if options.quick else STEPS).private(SEED)
    asked = first_of_each(read_rows(WORLD / "data/shelf_test.jsonl"), 2 if options.quick else ASKED)
    train = first_of_each(read_rows(WORLD / "data/shelf_train.jsonl"), 4 if options.quick else None)
    stream = by_task(train, out / "stream")
    guide = make_routers(library.address, stream, out, 1 if options.quick else 100)
    settings = {"asked": len(asked), "rows of the stream learned": len(train), "seed": SEED}
    units = Units(out / "units", folder / f"{NAME}_units.json", settings)
    bench = Bench(out, experts_in(library))
    learned = {arm: LEARNED[arm] for arm in (STATES, GATES)}
    if options.quick:
        learned = {a: replace(how, steps=2, rows=4, centring=1) for a, how in learned.items()}
    lesson = Lesson("", train, asked)
    ways: dict[str, tuple[Callable[[], dict[str, Any]], Mapping[str, Any]]] = {
        "base": (partial(untouched, bench, lesson), {}),
        **{
            name: (
                partial(by_route, bench, asked, _route(library.address, guide, told_of)),
                told_of,
            )
            for name, told_of in ROUTES.items()
        },
        **{
            arm: (partial(how, bench, lesson, out / arm, SEED), to_data(how))
            for arm, how in learned.items()
        },
        ORACLE: (partial(oracle, bench, lesson), {}),
    }
    found = {}
    for way, (make, own) in ways.items():
        found[way] = units.get(way, make, own)
        units.gather()
        print(f"{way}: {share(found[way]):.3f}", flush=True)
    others = (libraries if options.quick else FOLDER) / f"{LIBRARY}_units.json"
    check_file("the other arms", others, "what python benchmarks/modular_library.py measured")
    kept = json.loads(others.read_text())["units"]
    for way, (arm, how) in KEPT.items():
        found[way] = kept[f"{arm}, {SEED}"]["found"][how]
    write_results(NAME, summary(found), settings=settings, seeds=[SEED], folder=folder)


def _route(address: str, guide: Path, told_of: Mapping[str, Any]) -> RouteConfig:
    reads: dict[str, Any] = (
        {"classifier": guide} if told_of["route"] in ("classifier", "task_predictor") else {}
    )
    return RouteConfig(library=address, batch_rows=50, **told_of, **reads)


if __name__ == "__main__":
    main()
