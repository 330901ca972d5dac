"""What a domain offers to `train_gates.py`: a mixed model, a task for `fit`, a report."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from mole_vl.gates import GateSpec
from mole_vl.mixture import Mixture
from mole_vl.sites import SiteKind
from mole_vl.training import Task


class Domain(ABC):
    """Experts over a base, examples to train gates on, and held-out ones to judge them by."""

    @abstractmethod
    def mix(self, gate: GateSpec, site: SiteKind, after: int) -> Mapping[str, Mixture]:
        """Load and mix; returns the mixtures by the name of their component.

        The arguments are those of `mole_vl.mix`.
        """

    @abstractmethod
    def task(self, balance: float) -> Task:
        """The task that trains the mixtures' gates; `balance` weighs the balance loss."""

    @abstractmethod
    def report(self, folder: Path) -> str:
        """Judge the arms on held-out examples, leave files in `folder`, return a table.

        Every process calls it; the main one writes.
        """


def gate_parameters(mixtures: Mapping[str, Mixture]) -> dict[str, nn.Parameter]:
    """What gate training trains, by component and gate."""
    return {
        f"{component}.{name}": parameter
        for component, mixture in mixtures.items()
        for name, parameter in mixture.gates.named_parameters()
    }
