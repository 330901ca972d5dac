"""What is looked at while a run goes on."""

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator


@dataclass(frozen=True)
class Watch:
    """Something done every `every` steps and at the end that leaves the training as it is.

    Args:
        every: Steps between.
        look: Called with the steps done and the run's accelerator (its trackers, its autocast) in
            the main process, while the others wait.
    """

    every: int
    look: Callable[[int, Accelerator], None]
