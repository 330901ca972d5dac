"""What every benchmark writes: one JSON file of a stable schema.

name, commit, machine, versions, settings, seeds: how the numbers came about
rows: a list of measurements, each with
    measure   what was measured
    arm       on which side; a difference is named "gates - sum"
    n         number of units that the mean is over
    mean      their mean; their median where the measure's name says so
    low, high 95 % interval of it, by bootstrap over units
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
# Read when a benchmark begins: the tree may move on while it runs.
COMMIT = (
    subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    or "unknown"
)
_PACKAGES = ("torch", "transformers", "diffusers", "peft", "accelerate", "open_clip_torch")


@dataclass(frozen=True)
class Measurement:
    """One line of `rows`."""

    measure: str
    arm: str
    n: int
    mean: float
    low: float
    high: float


def measured(
    measure: str,
    arm: str,
    units: Sequence[float],
    draws: int = 10_000,
    centre: Callable[..., Any] = np.mean,
) -> Measurement:
    """A mean over units, or their median, and its 95 % bootstrap interval (fixed seed)."""
    values = np.asarray(units, dtype=float)
    chance = np.random.default_rng(0)
    drawn = centre(values[chance.integers(len(values), size=(draws, len(values)))], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Measurement(measure, arm, len(values), float(centre(values)), float(low), float(high))


def write_results(
    name: str,
    rows: Sequence[Measurement],
    *,
    settings: Mapping[str, Any],
    seeds: Sequence[int],
    folder: Path = FOLDER,
) -> Path:
    """Write `NAME.json` and print the rows as a table."""
    content = {
        "name": name,
        "commit": COMMIT,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {package: version(package) for package in _PACKAGES},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_NUM", "MALLOC_", "ACCELERATE_MIXED"))
        },
        "settings": dict(settings),
        "seeds": list(seeds),
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"| measure | arm | n | mean | 95 % interval |\n{'|---' * 5}|")
    for row in rows:
        interval = f"{row.low:.3f} to {row.high:.3f}"
        print(f"| {row.measure} | {row.arm} | {row.n} | {row.mean:.3f} | {interval} |")
    return file
