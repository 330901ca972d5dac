"""Reporting every fault of a configuration at once, and to the user of a program as a sentence."""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from traceback import walk_tb

_WRAPPING = "torch.utils._contextlib"
# A step of a training: what is raised inside is no fault of a configuration.
_STEPS = {("mole_vl.training.fit", "advance"), ("mole_vl.training.search", "_loss")}


def refuse(subject: str, faults: Iterable[str | None]) -> None:
    """Raise one ValueError that lists all faults (`None` stands for a check that passed)."""
    found = [fault for fault in faults if fault is not None]
    if found:
        raise ValueError(f"{subject}: " + "; ".join(found))


def at_least(name: str, value: float | None, low: float) -> str | None:
    """The fault of a value under its lower bound or without an end, or None."""
    if value is None or low <= value < math.inf:
        return None
    return f"{name} is {value}, expected at least {low}"


def whole_at_least(name: str, value: int | None, low: int) -> str | None:
    """The fault of a value that is no whole number, or under its lower bound, or None."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return at_least(name, value, low)
    return f"{name} is {value!r}, expected a whole number"


def positive(name: str, value: float | None) -> str | None:
    """The fault of a value that is no finite number above zero, or None."""
    if value is None or 0 < value < math.inf:
        return None
    return f"{name} is {value}, expected a positive number"


def share(name: str, value: float) -> str | None:
    """The fault of a part that is not in [0, 1), or None."""
    if 0 <= value < 1:
        return None
    return f"{name} is {value}, expected 0 <= {name} < 1"


def between(name: str, value: float, low: float, high: float) -> str | None:
    """The fault of a value outside [low, high], or None."""
    if low <= value <= high:
        return None
    return f"{name} is {value}, expected {low} to {high}"


def one_of(name: str, value: str, choices: Iterable[str]) -> str | None:
    """The fault of a word outside a list, or None."""
    names = tuple(choices)
    if value in names:
        return None
    return f"{name} is {value!r}, expected one of {', '.join(names)}"


def instance_of(name: str, value: object, kind: type) -> str | None:
    """The fault of a value of another kind (a class in place of its instance), or None."""
    if isinstance(value, kind):
        return None
    if isinstance(value, type):
        return f"{name} is the class {value.__name__}, expected an instance: {value.__name__}()"
    return f"{name} is a {type(value).__name__}, expected a {kind.__name__}"


def plain_word(name: str, value: str) -> str | None:
    """The fault of a name that can be no folder's, or None."""
    if value and "/" not in value and "\\" not in value and value not in {".", ".."}:
        return None
    return f"{name} is {value!r}, expected a plain word without slashes"


def told(faults: Sequence[str], count: int = 10) -> list[str]:
    """The first of many faults, and how many more there are."""
    more = len(faults) - count
    return [*faults[:count], *([f"and {more} more"] if more > 0 else [])]


def some(names: Iterable[str]) -> str:
    """The first three of many names."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


@contextmanager
def as_messages(*packages: str) -> Iterator[None]:
    """The body of a program: what its checks refuse ends it with a message and exit code 2.

    So does a training whose loss is no finite number. Everything else keeps its traceback: errors
    of other kinds or from other libraries but the command line's, and what is raised while a model
    computes or a training runs.

    Args:
        packages: Names of the packages, beside mole_vl and the program, whose checks are meant.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if not _refused(error, {"mole_vl", "jsonargparse", "__main__", *packages}):
            raise
        # Every process of a run finds the same fault.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from error


def _refused(error: BaseException, packages: set[str]) -> bool:
    """Whether a check of these packages raised the error, outside of all computation."""
    places = [
        (module, frame.f_code.co_name)
        for frame, _ in walk_tb(error.__traceback__)
        # What only wraps a function, as no_grad does, computes nothing.
        if (module := frame.f_globals.get("__name__", "")) != _WRAPPING
    ]
    roots = [module.partition(".")[0] for module, _ in places]
    if isinstance(error, FloatingPointError):
        return roots[-1] == "mole_vl"
    return roots[-1] in packages and "torch" not in roots and not _STEPS.intersection(places)


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Which settings of something made before are others now, and how."""
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name)
    ]
