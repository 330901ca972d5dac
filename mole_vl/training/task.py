"""What a domain hands to `fit`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mole_vl.training.rows import Row


@dataclass(frozen=True)
class Term:
    """One term of a loss: a scalar `value`, multiplied by `weight` in the sum.

    A term with `per_unit` is a mean over the batch's units (rows, or scored tokens); `fit` weighs
    it by the batch's part in the global batch. Any other term has seen all processes already.
    A term of weight 0 is a measure: it is logged, and no part of the loss.
    """

    value: Tensor
    weight: float = 1.0
    per_unit: bool = True


class Task(Protocol):
    """A model in training: its parameters, its batches, its loss.

    `batch`, `units` and `losses` see the rows that one process holds at once; what they draw at
    random they draw from the rows' generators.
    """

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by a name that stays the same from run to run."""
        ...

    def place(self, device: torch.device) -> None:
        """Move all that `losses` needs to the device."""
        ...

    def batch(self, rows: Sequence[Row]) -> Any:
        """The data of these rows."""
        ...

    def units(self, batch: Any) -> int:
        """How many units the per-unit terms average over: rows, or scored tokens."""
        ...

    def losses(self, batch: Any) -> Mapping[str, Term]:
        """The loss of one batch, term by term."""
        ...


@dataclass(frozen=True)
class Part:
    """Parameters that learn by themselves: their gradient is limited alone (`FitConfig.clip`).

    Args:
        names: The parameters.
        rate: What the run's learning rate is multiplied by for them.
    """

    names: Sequence[str]
    rate: float = 1.0


@runtime_checkable
class Apart(Protocol):
    """A task that trains several things at once, none of which may move another."""

    def apart(self) -> Sequence[Part]:
        """Each of them; every parameter of the task is in one."""
        ...
