"""Given weights of experts, that replace the gates'."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mole_vl.faults import refuse
from mole_vl.given import numbers
from pipelines.schedules import Step, at

# A weight by expert's name, zero for the others; or (E,), or (pictures, E), in the experts' order.
Weights: TypeAlias = Mapping[str, float] | Tensor | Sequence[float] | Sequence[Sequence[float]]
# The same for all steps; several mappings or tensors spread over them; or a function of the step.
WeightSchedule: TypeAlias = (
    Weights | Sequence[Mapping[str, float] | Tensor] | Callable[[Step], Weights]
)


def check_known(names: Sequence[str], given: Any, where: str) -> None:
    """Raise ValueError if a name is no expert's."""
    strange = [name for name in given if name not in names]
    if strange:
        raise ValueError(
            f"{where}: unknown expert {', '.join(map(repr, strange))}; the pipeline has "
            f"{', '.join(names)}"
        )


def in_order(names: Sequence[str], given: Any, where: str) -> list[float]:
    """Weights by expert's name in the order of the names, zero for the others.

    Raises:
        ValueError: No mapping, an unknown name, or what is no number.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given!r}, expected weights by expert's name")
    check_known(names, given, where)
    return numbers(names, given)


def weights_at(given: WeightSchedule, step: Step, names: Sequence[str], pictures: int) -> Tensor:
    """The weights of a step, (E,) or (pictures, E), in the order of `names`.

    Raises:
        ValueError: An unknown name, or another number of experts or pictures.
    """
    now = at(given, step) if callable(given) or _staged(given) else given
    if isinstance(now, Mapping):
        now = in_order(names, now, "weights")
    weights = torch.as_tensor(now, dtype=torch.float32)
    fits = weights.dim() in (1, 2) and weights.shape[-1] == len(names)
    if not fits or (weights.dim() == 2 and weights.shape[0] != pictures):
        raise ValueError(
            f"weights of shape {tuple(weights.shape)}: expected ({len(names)},) or "
            f"({pictures}, {len(names)}), for {pictures} pictures and the experts "
            f"{', '.join(names)}"
        )
    return weights


def check_weights(given: WeightSchedule, names: Sequence[str], pictures: int) -> None:
    """Raise ValueError unless all weights that can be known before the first step fit."""
    if callable(given):
        return
    for stage in given if _staged(given) else [given]:
        weights_at(stage, Step(index=0, count=1), names, pictures)  # pyright: ignore[reportArgumentType]


def of_prompts(weights: Tensor, copies: int) -> Tensor:
    """Weights of a text encoder's rows, of which each serves `copies` pictures.

    Raises:
        ValueError: Pictures of one prompt that are to differ.
    """
    if weights.dim() == 1:
        return weights
    grouped = weights.unflatten(0, (-1, copies))
    same = bool((grouped == grouped[:, :1]).all())
    fault = "pictures of one prompt share its encoding, so their weights must be equal"
    refuse("weights", [None if same else f"{fault} where a text encoder is mixed"])
    return grouped[:, 0]


def _staged(given: Any) -> bool:
    return isinstance(given, list | tuple) and any(isinstance(g, Mapping | Tensor) for g in given)
