"""Reporting every fault of a configuration at once."""

from collections.abc import Iterable


def refuse(subject: str, faults: Iterable[str | None]) -> None:
    """Raise one ValueError that lists all faults (`None` stands for a check that passed)."""
    found = [fault for fault in faults if fault is not None]
    if found:
        raise ValueError(f"{subject}: " + "; ".join(found))


def at_least(name: str, value: float | None, low: float) -> str | None:
    """The fault of a value under its lower bound, or None."""
    if value is None or value >= low:
        return None
    return f"{name} is {value}, expected at least {low}"


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
