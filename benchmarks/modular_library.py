"""A private library, a cluster's experts (MBC), or one LoRA for all, of equal parameters and steps.

    python benchmarks/modular_library.py            # --quick: one seed, few steps, for a look
    python benchmarks/modular_library.py --rates    # which learning rate, on development rows
    python benchmarks/modular_library.py --longer   # four times the steps, one seed, no clusters

SmolLM2-135M-Instruct learns the sixteen tasks of the text world's shelf by `nlp.private_library`,
16 steps of 16 rows for each task, on all linear layers: sixteen LoRAs of rank 4, one a task; four
of rank 16, one for each cluster that k-means finds among those sixteen (k = 4, cosines of Delta-W),
on the rows of all of its tasks; one of rank 64. Alpha is twice the rank. Each arm has as many
parameters, takes as many steps, and sees as many rows of each task.

Asked are 400 held-out rows of the mixed stream, in wordings of their own, in two ways: the row's
task is told, and its expert speaks; or a classifier guesses it from the prompt (`shelf_routers.py`)
and the expert of the likeliest task speaks. One LoRA needs to know no task. The unit is the row, in
the mean over three seeds, each with a library, clusters, and a start of its own.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fewshot_bench import ROWS, WORLD, Bench, share
from shelf_routers import task_classifier, told

from mole_vl import Expert, Mixture
from mole_vl.clustering import cluster
from mole_vl.clusters import Clusters
from mole_vl.fresh import Form
from mole_vl.gates import Average
from mole_vl.library import ExpertLibrary
from mole_vl.lora import LoRA
from mole_vl.training import FitConfig
from nlp.data import TextRow, read_rows
from nlp.mixed_text import first_of_each
from nlp.private_config import PrivateLibraryConfig
from nlp.private_library import main as train_library
from nlp.shelf import tasks_of
from nlp.world.tasks import SHELF
from results import FOLDER, ROOT, Measurement, measured, write_results
from units import Units

NAME = "modular_library"
SEEDS, STEPS, LONGER, TRIED, ASKED, CLUSTERS, RANK = (0, 1, 2), 16, 64, 12, 25, 4, 4
PRIVATE, MBC, SHARED = "private library", "MBC", "one shared LoRA"
TASKS = tuple(source.name for source in SHELF)
DATA = {task: WORLD / f"data/{task}_train.jsonl" for task in TASKS}
RATES: Mapping[str, Sequence[float]] = {
    PRIVATE: (1e-3, 3e-3, 1e-2),
    MBC: (1e-3, 2e-3),
    SHARED: (1e-3,),
}
"""What `--rates` tries. One LoRA of rank 64 at 3e-3 was broken off: after 40 of 192 steps its loss
was 2.0, at 1e-3 1.5.
"""
RATE: Mapping[str, float] = {PRIVATE: 3e-3, MBC: 2e-3, SHARED: 1e-3}
"""As `--rates` chose them."""


@dataclass(frozen=True)
class Lab:
    """Where libraries are made, and how long each task is learned.

    Args:
        out: Their folder.
        steps: Steps of training for each task.
    """

    out: Path
    steps: int

    def library(
        self, arm: str, seed: int, rate: float, groups: Mapping[str, Sequence[str]]
    ) -> ExpertLibrary:
        """A library with one expert for each group of tasks; what is missing is trained.

        The ranks share out what sixteen experts of rank 4 have.
        """
        place = self.out / f"{arm}, {seed}, {rate}"
        rank = RANK * len(TASKS) // len(groups)
        for size in sorted({len(tasks) for tasks in groups.values()}):
            train_library(
                PrivateLibraryConfig(
                    library=f"local://{place}/library",
                    data=DATA,
                    experts={n: ",".join(own) for n, own in groups.items() if len(own) == size},
                    lora=LoRA(form=Form(rank=rank, alpha=2 * rank), dropout=0.0, seed=seed),
                    fit=FitConfig(
                        output=place / "runs",
                        steps=self.steps * size,
                        rows=ROWS,
                        lr=rate,
                        warmup=min(4, self.steps),
                        seed=seed,
                        save_every=200,
                        progress=False,
                    ),
                )
            )
        return ExpertLibrary.open(f"local://{place}/library")

    def private(self, seed: int, rate: float = RATE[PRIVATE]) -> ExpertLibrary:
        """One expert a task."""
        return self.library(PRIVATE, seed, rate, {task: (task,) for task in TASKS})

    def clusters(self, seed: int) -> Clusters:
        """Of the private library's experts."""
        return cluster(experts_in(self.private(seed)), CLUSTERS)

    def of_arm(self, arm: str, seed: int, rate: float) -> ExpertLibrary:
        """The library of an arm."""
        if arm == PRIVATE:
            return self.private(seed, rate)
        groups = {"shared": TASKS}
        if arm == MBC:
            found = self.clusters(seed).groups
            groups = {f"cluster_{place}": tuple(group) for place, group in enumerate(found)}
        return self.library(arm, seed, rate, groups)

    def cell(self, arm: str, seed: int, rate: float, asked: Sequence[TextRow]) -> dict[str, Any]:
        """Train an arm, then ask."""
        return ask(self.out, self.of_arm(arm, seed, rate), asked)


def experts_in(library: ExpertLibrary) -> list[Expert]:
    """All experts of a library, in the order of its list."""
    return [library[name].expert for name in library.list().experts]


def owners(library: ExpertLibrary) -> dict[str, str]:
    """The expert of each task."""
    return {task: e.name for e in library.list().experts.values() for task in tasks_of(e)}


def by_owner(mixture: Mixture, tasks: Sequence[str], own: Mapping[str, str]) -> torch.Tensor:
    """Weights (rows, experts): of each row its task's expert alone."""
    return torch.tensor([[float(own[task] == name) for name in mixture.names] for task in tasks])


def ask(out: Path, library: ExpertLibrary, asked: Sequence[TextRow]) -> dict[str, Any]:
    """What a library's experts answer, with the task told, and with the task guessed."""
    bench = Bench(out, experts_in(library))
    own, rows = owners(library), bench.encoded(asked)
    mixture = bench.mixed("", Average())
    classifier = task_classifier()
    likely = classifier.probabilities([row.prompt for row in asked]).argmax(1).tolist()
    guessed = [classifier.tasks[place] for place in likely]
    found = {}
    for name, tasks in {"told": [row.task for row in asked], "guessed": guessed}.items():
        around = told(mixture, rows, by_owner(mixture, tasks, own))
        found[name] = bench.judge(asked, around=around)
    mixture.unmix()
    return found | {
        "right": float(
            np.mean([row.task == task for row, task in zip(asked, guessed, strict=True)])
        ),
        "groups": [list(tasks_of(info)) for info in library.list().experts.values()],
        "parameters": sum(
            one.a.numel() + one.b.numel()
            for expert in experts_in(library)
            for one in expert.layers.values()
        ),
    }


def rates(units: Units, lab: Lab, asked: Sequence[TextRow]) -> None:
    """What each rate makes of an arm on development rows, in fewer steps, with one seed."""
    for arm, tried in RATES.items():
        for rate in tried:
            key = f"rate {rate}, {arm}"
            make = partial(lab.cell, arm, SEEDS[0], rate, asked)
            one = units.get(key, make, {"rate": rate, "steps": lab.steps})
            print(f"{key}: {share(one['told']):.3f}", flush=True)
            units.gather()


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Measurement]:
    """Exact match by arm, task told and guessed, overall and what each gains; sizes."""
    rows = []
    hits = {
        (arm, way): np.mean([one[way]["hits"] for one in cells], 0)
        for arm, cells in found.items()
        for way in ("told", "guessed")
    }
    for way in ("told", "guessed"):
        measure = f"exact match, task {way}"
        rows += [measured(measure, arm, hits[arm, way].tolist()) for arm in found]
        for one, other in combinations(found, 2):
            gain = hits[one, way] - hits[other, way]
            rows.append(measured(measure, f"{one} - {other}", gain.tolist()))
    for arm, cells in found.items():
        shares = [share(one["told"]) for one in cells]
        rows.append(measured("exact match of a seed, task told", arm, shares))
        logs = np.mean([one["told"]["told"] for one in cells], 0)
        rows.append(measured("log-likelihood per answer token, task told", arm, logs.tolist()))
        size = [one["parameters"] / 1e6 for one in cells]
        rows.append(measured("parameters, millions", arm, size))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, for a look")
    parser.add_argument("--rates", action="store_true", help="choose learning rates")
    parser.add_argument("--longer", action="store_true", help="four times the steps, no clusters")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, help="make these alone")
    options = parser.parse_args()
    kind = "quick" if options.quick else "longer" if options.longer else "full"
    out = ROOT / "out/benchmarks" / NAME / kind
    folder = out if options.quick else FOLDER
    name = f"{NAME}_longer" if options.longer else NAME
    steps, seeds, asked = {
        "quick": (1, SEEDS[:1], 2),
        "longer": (LONGER, SEEDS[:1], ASKED),
        "full": (STEPS, SEEDS, ASKED),
    }[kind]
    settings = {"rows a step": ROWS, "asked of each task": asked}
    units = Units(out / "units", folder / f"{name}_units.json", settings)
    split = "dev" if options.rates else "test"
    rows = first_of_each(read_rows(WORLD / f"data/shelf_{split}.jsonl"), asked)
    lab = Lab(out, steps)
    if options.rates:
        rates(units, Lab(out / "rates", 1 if options.quick else TRIED), rows)
        return
    asking = {arm: rate for arm, rate in RATE.items() if arm != MBC or not options.longer}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in asking}
    for seed in options.seeds or seeds:
        for arm, rate in asking.items():
            make = partial(lab.cell, arm, seed, rate, rows)
            one = units.get(f"{arm}, {seed}", make, {"rate": rate, "steps": steps})
            found[arm].append(one)
            units.gather()
            shown = {way: round(share(one[way]), 3) for way in ("told", "guessed")}
            print(f"{arm}, {seed}: {shown}, {one['groups']}", flush=True)
    if not options.seeds:
        told_of = settings | {
            "steps of a task": steps,
            "rates": asking,
            "clusters": [c["groups"] for c in found.get(MBC, ())],
        }
        write_results(name, summary(found), settings=told_of, seeds=seeds, folder=folder)


if __name__ == "__main__":
    main()
