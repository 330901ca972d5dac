"""All commands of `mole`: those of a library, and those that ask for a base."""

from collections.abc import Callable, Mapping
from typing import Any

from apps import mole_library, mole_transform
from mole_vl.program import command
from nlp.evaluate_library import EvaluateLibraryConfig, evaluate_library

COMMANDS = {
    "library": mole_library.COMMANDS,
    "transform": mole_transform.COMMANDS,
    "evaluate": EvaluateLibraryConfig,
}
RUNS: Mapping[type, Callable[[Any], object]] = {
    **mole_transform.RUNS,
    EvaluateLibraryConfig: evaluate_library,
}


def run(name: str, about: str | None) -> None:
    """Run the command that is typed.

    Args:
        name: What the program calls itself.
        about: What it says of itself.
    """
    settings = command(COMMANDS, name, about)
    if type(settings) in RUNS:
        RUNS[type(settings)](settings)
