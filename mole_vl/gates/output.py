"""What a gate returns."""

from dataclasses import dataclass

from torch import Tensor

NOBODY = -1
"""In place of an expert: the position has fewer than K."""


@dataclass(frozen=True)
class GateOutput:
    """All that a gate knows of one call.

    Args:
        weights: Weight of each chosen expert, (..., K); the leading axes say what the weights
            vary over: nothing, (rows,), or (rows, positions).
        experts: Index of each chosen expert, (..., K), `NOBODY` where a weight is nobody's; None
            where all stand in order (K = E).
        logits: Scores before the normaliser, (..., E), in fp32; minus infinity where an expert
            cannot be chosen.
        slots: Whether weights and logits are of slots, (..., S), and `experts` who fills them.
    """

    weights: Tensor
    experts: Tensor | None
    logits: Tensor
    slots: bool = False
