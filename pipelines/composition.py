"""Multi-LoRA composition without training (Zhong et al., 2024, arXiv 2402.16843).

Each LoRA draws alone: in turn (Switch), or all at each step (Composite). Text encoders, which run
once before the first step, keep their own gates.
"""

from abc import abstractmethod
from dataclasses import dataclass

from mole_vl.faults import at_least, refuse
from pipelines.schedules import Step


class Composition:
    """Which experts draw a step, each alone; their guided predictions are averaged."""

    @abstractmethod
    def alone(self, step: Step, experts: int) -> list[int]:
        """The experts of a step by their place among the network's unmasked ones."""


@dataclass(frozen=True, kw_only=True)
class Switch(Composition):
    """LoRA Switch: one expert at a time, in the order they were loaded, then the first again.

    Args:
        every: Steps until the next expert's turn.
    """

    every: int = 5

    def __post_init__(self) -> None:
        refuse("Switch", [at_least("every", self.every, 1)])

    def alone(self, step: Step, experts: int) -> list[int]:
        """The one whose turn it is."""
        return [step.index // self.every % experts]


@dataclass(frozen=True, kw_only=True)
class Composite(Composition):
    """LoRA Composite: at each step one guided prediction per expert, averaged.

    A step takes as long as that many pictures.
    """

    def alone(self, step: Step, experts: int) -> list[int]:
        """All of them."""
        return list(range(experts))
