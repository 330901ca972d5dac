"""What a gate returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GateOutput:
    """All that a gate knows of one call.

    Args:
        weights: Weight of each chosen expert, (..., K); the leading axes say what the weights
            vary over: nothing, (rows,), or (rows, positions).
        experts: Index of each chosen expert, (..., K); None where all stand in order (K = E).
        logits: Scores before the normaliser, (..., E), in fp32.
    """

    weights: Tensor
    experts: Tensor | None
    logits: Tensor
