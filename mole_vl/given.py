"""What users tell a mixture, checked: weights, names of experts and tenants, strengths."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mole_vl.faults import refuse


def vector(weights: Any, names: Sequence[str], device: torch.device) -> Tensor:
    """Weights as a tensor, (..., E) in fp32.

    Args:
        weights: Numbers in the order of `names`, or by expert's name, zero for the others.
        names: The experts'.
        device: Where the tensor lies.

    Raises:
        ValueError: A name that is no expert's, what is no finite number, a wrong length.
    """
    if isinstance(weights, Mapping):
        check_known(weights, names)
        weights = numbers(names, weights)
    try:
        tensor = torch.as_tensor(weights, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"weights is {weights!r}, expected numbers, or numbers by expert's name"
        ) from error
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"weights are {weights!r}, expected finite numbers")
    if tensor.shape[-1:] != (len(names),):
        raise ValueError(
            f"weights of shape {tuple(tensor.shape)}: expected {len(names)} at the end, for "
            f"{', '.join(names)}"
        )
    return tensor


def numbers(names: Sequence[str], weights: Mapping[str, Any]) -> list[float]:
    """Weights by expert's name in the order of `names`, zero for the others.

    Raises:
        ValueError: A weight that is no number.
    """
    odd = [f"{name} weighs {w!r}, expected a number" for name, w in weights.items() if not _one(w)]
    refuse("weights", odd)
    return [float(weights.get(name, 0.0)) for name in names]


def _one(weight: Any) -> bool:
    return isinstance(weight, Real) or (isinstance(weight, Tensor) and weight.numel() == 1)


def check_known(names: Iterable[str], experts: Sequence[str]) -> None:
    """Raise ValueError where a name is none of the experts'."""
    strange = [name for name in names if name not in experts]
    if strange:
        raise ValueError(
            f"unknown expert {', '.join(map(repr, strange))}: the mixture has {', '.join(experts)}"
        )


def check_strength(strength: Any) -> None:
    """Raise ValueError where a strength is no one finite number."""
    if not isinstance(strength, Real | Tensor):
        raise ValueError(f"strength is {strength!r}, expected a number or a tensor of one")
    if isinstance(strength, Tensor) and strength.numel() != 1:
        raise ValueError(
            f"strength has {strength.numel()} values, expected one for the whole mixture; "
            "pinned() gives each row weights of its own"
        )
    if not bool(torch.as_tensor(strength).isfinite().all()):
        raise ValueError(f"strength is {strength!r}, expected finite numbers")


def tenants(names: Sequence[str], known: Sequence[str]) -> Tensor:
    """The number of each row's tenant, (rows,).

    Raises:
        ValueError: A string in place of a list, an unknown tenant.
    """
    if isinstance(names, str):
        raise ValueError(f"condition: tenant is {names!r}, expected a list, a name for each row")
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(
            f"condition: tenant names {strange[0]!r}, and this mixture's tenants are "
            f"{', '.join(known) or 'none'}"
        )
    return torch.tensor([known.index(name) for name in names])
