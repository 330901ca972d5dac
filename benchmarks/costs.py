"""What a measure costs: seconds by two clocks, and memory in a process of its own."""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from results import Measurement, measured

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_UNITS_PER_GIB = 2**30 if sys.platform == "darwin" else 2**20


def clocks() -> np.ndarray:
    """Seconds by the clock, and of this process's CPU, which other processes do not slow down."""
    return np.array([time.monotonic(), time.process_time()])


def in_turns(
    measure: str,
    sides: Mapping[str, Callable[[], object]],
    turns: int,
    ratios: Sequence[tuple[str, str]],
) -> list[Measurement]:
    """Median seconds of several sides that take turns, and of one's over another's in a turn.

    Args:
        measure: What is measured.
        sides: What each does in a turn, by its name. A first turn warms up, and is not counted.
        turns: How many are counted.
        ratios: Whose seconds are divided by whose.
    """
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(turns + 1):
        for side, run in sides.items():
            start = clocks()
            run()
            spent[side].append(float((clocks() - start)[0]))
    kept = {side: own[1:] for side, own in spent.items()}
    name = f"seconds, median: {measure}"
    rows = [measured(name, side, own, centre=np.median) for side, own in kept.items()]
    for one, other in ratios:
        ratio = np.divide(kept[one], kept[other]).tolist()
        rows.append(measured(name, f"{one} / {other}", ratio, centre=np.median))
    return rows


def alone(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a function returns in a fresh process, and that process's peak resident GiB.

    Linux counts the size that the parent had at its peak as the child's: keep the parent small, and
    let every large thing be made in such a process.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, function, arguments).result()


def _measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    found = function(*arguments)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _UNITS_PER_GIB
