"""The arms of a comparison: the base, each expert alone, the merges, the gates.

All sides of a table are one mixed model under different contexts, so that nothing but the weights
differs between them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

from mole_vl.mixture import Mixture

Arm = Callable[[], AbstractContextManager[object]]


def together(contexts: Sequence[AbstractContextManager[object]]) -> ExitStack:
    """Several contexts as one."""
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


def pinned_arm(mixtures: Sequence[Mixture], weights: Mapping[str, float]) -> Arm:
    """The arm in which every mixture has these weights everywhere.

    A mixture may lack some of the experts (a LoRA without a text encoder's part).
    """
    return lambda: together(
        [
            mixture.pinned({name: w for name, w in weights.items() if name in mixture.names})
            for mixture in mixtures
        ]
    )


def arms(mixtures: Sequence[Mixture]) -> dict[str, Arm]:
    """Arms by name: `base`, each expert's name, `sum`, `NLA`, `gates`.

    Args:
        mixtures: The mixed models that work together (an UNet's and its text encoder's).
    """
    names = list(dict.fromkeys(name for mixture in mixtures for name in mixture.names))
    alone = {name: pinned_arm(mixtures, {name: 1.0}) for name in names}
    return {
        "base": lambda: together([mixture.disabled() for mixture in mixtures]),
        **alone,
        "sum": pinned_arm(mixtures, dict.fromkeys(names, 1.0)),
        "NLA": pinned_arm(mixtures, dict.fromkeys(names, 1 / len(names))),
        "gates": nullcontext,
    }
