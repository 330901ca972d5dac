"""How a call of a pipeline mixes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from dreambooth.adapter import Negatives
from mole_vl.faults import instance_of, one_of, refuse
from pipelines.composition import Composition
from pipelines.schedules import Schedule
from pipelines.weights import WeightSchedule


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a call mixes.

    Args:
        strength: Multiplies the whole mixture, or a schedule of it. A text encoder, which runs
            before the first step, takes the first step's; of weights alike.
        masked: Names of experts left out.
        weights: Weights that replace the gates', or a schedule of them.
        mixing: Switch or Composite, which replace the UNet's gates.
        guidance: Whether a picture's negative row takes its positive row's gate results (shared),
            or has its own. Text encoders' negative prompts have their own.
    """

    strength: Schedule[float] = 1.0
    masked: Sequence[str] = ()
    weights: WeightSchedule | None = None
    mixing: Composition | None = None
    guidance: Negatives = "shared"

    def __post_init__(self) -> None:
        both = self.weights is not None and self.mixing is not None
        empty = any(isinstance(v, list | tuple) and not v for v in (self.strength, self.weights))
        refuse(
            "drawing",
            [
                one_of("guidance", self.guidance, get_args(Negatives)),
                None if self.mixing is None else instance_of("mixing", self.mixing, Composition),
                "weights and mixing both replace the gates, expected one of them" if both else None,
                "a schedule is empty, expected at least one value" if empty else None,
            ],
        )
