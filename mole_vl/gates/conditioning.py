"""Conditioning: what a forward is told, added to what a gate reads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conditioning(nn.Module):
    """Linear in a forward's features, without a bias, which scores have. It starts at zero.

    Args:
        experts: E.
        width: Width of the features, F.
    """

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, width))

    def forward(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Logits of rows, whatever they varied over before.

        Args:
            logits: (E,), (rows, E) or (rows, positions, E).
            features: (rows, F).

        Returns:
            (rows, E) or (rows, positions, E).

        Raises:
            ValueError: No features are given.
        """
        if features is None:
            raise ValueError("this gate is conditioned on features of the forward; none are given")
        told_rE = F.linear(features.float(), self.weight.float())
        return logits + (told_rE.unsqueeze(1) if logits.dim() == 3 else told_rE)

    def extra_repr(self) -> str:
        """What `print` says of it."""
        return f"features={self.weight.shape[1]}"
