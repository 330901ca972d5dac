"""Learned gates against sum, average and oracle on the mixed text stream; three seeds.

    python benchmarks/text_mixed.py [--quick]

Trains the gates of `configs/text_mixed.yaml` once a seed and asks every arm the same held-out
rows. The unit is the row, its hits averaged over seeds first; differences are paired.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mole_vl.domain import prepare
from mole_vl.training import fit
from nlp.mixed_text import ORACLE
from presets import described, load, plan
from results import FOLDER, ROOT, Measurement, measured, write_results

CONFIG = ROOT / "configs/text_mixed.yaml"
FIXED = ["base", "sum", "NLA", ORACLE]


def hits_of_seed(seed: int, quick: bool) -> tuple[list[str], dict[str, list[bool]], float]:
    """The held-out rows' tasks, their hits under the trained gates, and the seconds of training."""
    preset = load(CONFIG)
    steps = 10 if quick else preset.fit.steps
    output = ROOT / "out/benchmarks/text_mixed" / f"{'quick' if quick else 'full'}-{seed}"
    config = replace(
        preset.fit, seed=seed, steps=steps, warmup=min(preset.fit.warmup, steps), output=output
    )
    domain = preset.domain
    domain.asked = 6 if quick else None
    _, task, settings = prepare(domain, preset.gate, config, **plan(preset))
    result = fit(task, config, settings)
    hits = domain.hits(["gates"] if seed else [*FIXED, "gates"])
    return [row.row.task for row in domain.test_rows], hits, result.seconds


def measurements(
    tasks: list[str], fixed: dict[str, np.ndarray], gates: np.ndarray
) -> list[Measurement]:
    """Exact match of each arm, overall and by task, and the paired differences to the gates."""
    arms = {**fixed, "gates": gates}
    rows = [measured("exact match", name, values.tolist()) for name, values in arms.items()]
    for name in ("sum", "NLA", ORACLE):
        rows.append(measured("exact match", f"gates - {name}", (gates - fixed[name]).tolist()))
    own = np.array(tasks)
    for task in sorted(set(tasks)):
        for name, values in arms.items():
            rows.append(measured(f"exact match, {task}", name, values[own == task].tolist()))
    return rows


def plot(rows: list[Measurement], file: Path) -> None:
    """Exact match by arm with its interval."""
    shown = [row for row in rows if row.measure == "exact match" and " - " not in row.arm]
    figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
    centre = np.array([row.mean for row in shown])
    errors = [centre - [row.low for row in shown], np.array([row.high for row in shown]) - centre]
    axes.barh([row.arm for row in shown], centre, xerr=errors, color="#4c78a8", ecolor="#333333")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("exact match on held-out rows, 95 % interval")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run the benchmark."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--quick", action="store_true", help="few steps and rows, for a look")
    quick = options.parse_args().quick
    seeds = [0] if quick else [0, 1, 2]
    fixed: dict[str, np.ndarray] = {}
    by_seed, seconds, tasks = [], [], []
    for seed in seeds:
        tasks, hits, spent = hits_of_seed(seed, quick)
        fixed |= {name: np.array(hits[name], float) for name in FIXED if name in hits}
        by_seed.append(np.array(hits["gates"], float))
        seconds.append(spent)
        print(f"seed {seed}: gates {by_seed[-1].mean():.3f}, trained in {spent:.0f} s", flush=True)
    rows = measurements(tasks, fixed, np.mean(by_seed, 0))
    rows.append(measured("exact match of a seed", "gates", [hits.mean() for hits in by_seed]))
    rows.append(measured("seconds of training", "gates", seconds))
    settings = described(CONFIG) | {"quick": quick}
    folder = ROOT / "out/benchmarks" if quick else FOLDER
    file = write_results("text_mixed", rows, settings=settings, seeds=seeds, folder=folder)
    plot(rows, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
