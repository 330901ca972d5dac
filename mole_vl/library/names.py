"""Names that are safe as parts of an address in every store."""

import re

from mole_vl.faults import refuse

# What disks, object stores and the Hub all take, and no pattern or address reads as a sign.
_WORD = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.+-]{0,98}[A-Za-z0-9_+-])?")


def word_fault(what: str, value: object) -> str | None:
    """The fault of a name that could leave its folder, or that some store refuses, or None."""
    if isinstance(value, str) and _WORD.fullmatch(value):
        return None
    return (
        f"{what} is {value!r}, expected at most 100 letters A to Z, digits, '.', '_', '+', '-', "
        "the first a letter, a digit or '_', the last no '.'"
    )


def check_word(what: str, value: object) -> None:
    """Raise ValueError unless a name is safe as part of an address."""
    refuse("library", [word_fault(what, value)])
