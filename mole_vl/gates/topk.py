"""The k highest scores."""

import math

from torch import Tensor


def top_only(logits: Tensor, k: int | None) -> Tensor:
    """Scores (..., E) with all but the k highest at minus infinity; ties go to the lower index.

    Args:
        logits: The scores.
        k: None for all.
    """
    if k is None or k >= logits.shape[-1]:
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return logits.scatter(-1, order[..., k:], -math.inf)
