"""What varies over the steps of a drawing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of the network while pictures are drawn.

    Args:
        index: Number of the call, from 0. Some samplers call more often than they have inference
            steps (Heun twice, PNDM once more).
        count: Calls in all.
    """

    index: int
    count: int

    @property
    def share(self) -> float:
        """How far the drawing is, from 0 at the first call to 1 at the last."""
        return self.index / max(1, self.count - 1)


FIRST = Step(index=0, count=1)

# A value for all steps, values spread evenly over them, or what a function says of each.
Schedule: TypeAlias = T | Sequence[T] | Callable[[Step], T]


def at(schedule: Schedule[Any], step: Step) -> Any:
    """The value of a schedule at a step; (1.0, 0.5) is 1.0 in the first half, 0.5 in the second."""
    if callable(schedule):
        return schedule(step)
    if isinstance(schedule, list | tuple):
        return schedule[step.index * len(schedule) // step.count]
    return schedule
