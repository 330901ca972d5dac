"""What a measure costs: seconds by two clocks, and memory in a process of its own."""

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_UNITS_PER_GIB = 2**30 if sys.platform == "darwin" else 2**20


def clocks() -> np.ndarray:
    """Seconds by the clock, and of this process's CPU, which other processes do not slow down."""
    return np.array([time.monotonic(), time.process_time()])


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
