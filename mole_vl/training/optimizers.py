"""The optimisers that `fit` steps with."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

Rule = Literal["adamw", "muon"]


def make_optimizers(
    rule: Rule, parameters: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float
) -> dict[str, Optimizer]:
    """The optimisers of some parameters, by rule; each parameter is in one of them.

    Args:
        rule: `adamw` for all; or `muon` for the matrices, embeddings aside (what is named so),
            and `adamw` for the rest. Source: Jordan et al., "Muon", 2024, its updates scaled to
            AdamW's (Liu et al. 2025), so that one rate serves both.
        parameters: By name.
        lr: Learning rate.
        weight_decay: Decoupled decay.
    """
    matrices = {
        name: parameter
        for name, parameter in parameters.items()
        if rule == "muon" and parameter.dim() == 2 and "embed" not in name
    }
    rest = [parameter for name, parameter in parameters.items() if name not in matrices]
    found: dict[str, Optimizer] = {}
    if matrices:
        found["muon"] = torch.optim.Muon(
            matrices.values(), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
    if rest:
        found["adamw"] = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)
    return found
