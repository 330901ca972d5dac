"""Settings in the keys of another project: what a file says, as a dataclass types it."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser


def values_of(
    given: Mapping[Any, Any], kind: type, where: str = "", *, aside: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """What is given for the fields of a settings class, as these are typed, and all faults.

    A key without a value has its default.

    Args:
        given: Values by key, but for those that are read elsewhere.
        kind: The class, a dataclass.
        where: What stands before a key in messages.
        aside: Fields that are read elsewhere.
    """
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in aside}
    parser = ArgumentParser(exit_on_error=False)
    for name, hint in hints.items():
        parser.add_argument(f"--{name}", type=hint)
    values, faults = {}, []
    for key, value in given.items():
        if key not in hints:
            near = get_close_matches(str(key), hints, n=1, cutoff=0.0)
            faults.append(f"unknown key {where}{key}; the nearest known one is {near[0]}")
        elif value is not None:
            try:
                values[key] = parser.parse_object({key: value}, defaults=False)[key]
            except (ArgumentError, TypeError, ValueError):
                faults.append(f"{where}{key} is {value!r}, expected {_said(hints[key])}")
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    absent = [key for key in needed if key in hints and given.get(key) is None]
    return values, [*faults, *(f"{where}{key} has no value" for key in absent)]


def _said(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if isinstance(hint, type) and not get_args(hint):
        return {"str": "text", "Path": "a path", "bool": "true or false"}.get(
            hint.__name__, f"a number ({hint.__name__})"
        )
    if get_origin(hint) in (list, tuple):
        return "a list of names"
    if get_origin(hint) is dict:
        return "true or false by name"
    return " or ".join(_said(one) for one in get_args(hint) if one is not type(None))
