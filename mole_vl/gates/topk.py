"""The k highest scores."""

import torch
from torch import Tensor


def highest(scores: Tensor, k: int) -> Tensor:
    """Which of the scores (..., E) are the k highest, bool; ties go to the lower index."""
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :k], True)
