"""The optimisers that `fit` steps with."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

Rule = Literal["adamw", "adamw8bit", "muon"]

_EIGHT_BIT = "bitsandbytes"


def lacking(rule: str) -> str | None:
    """The fault of an optimiser whose package is missing, or None."""
    if rule != "adamw8bit" or find_spec(_EIGHT_BIT):
        return None
    return (
        f"optimizer is {rule!r}, which needs the package {_EIGHT_BIT}: "
        "pip install 'mole-vl[eight_bit]', or take 'adamw'"
    )


def make_optimizers(
    rule: Rule,
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Optimizer]:
    """The optimisers of some parameters, by rule; each parameter is in one of them.

    Args:
        rule: `adamw` for all; `adamw8bit` for all, its averages in 8 bits where a tensor has 4096
            numbers or more (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization");
            or `muon` for the matrices, embeddings aside (what is named so), and `adamw` for the
            rest. Source: Jordan et al., "Muon", 2024, its updates scaled to AdamW's (Liu et al.
            2025), so that one rate serves both.
        parameters: By name.
        lr: Learning rate.
        weight_decay: Decoupled decay.
        rates: What the rate of each parameter is multiplied by, 1 if not given; their groups tell
            it as `rate`.
    """
    if rule == "adamw8bit":
        # An extra that takes seconds to load: it comes in for those who ask for it.
        optim = import_module(_EIGHT_BIT).optim
        groups = _by_rate(parameters, lr, rates or {})
        return {rule: optim.AdamW8bit(groups, lr=lr, weight_decay=weight_decay)}
    matrices = {
        name: parameter
        for name, parameter in parameters.items()
        if rule == "muon" and parameter.dim() == 2 and "embed" not in name
    }
    rest = {name: own for name, own in parameters.items() if name not in matrices}
    found: dict[str, Optimizer] = {}
    if matrices:
        found["muon"] = torch.optim.Muon(
            _by_rate(matrices, lr, rates or {}),
            lr=lr,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    if rest:
        groups = _by_rate(rest, lr, rates or {})
        found["adamw"] = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    return found


def _by_rate(
    parameters: Mapping[str, nn.Parameter], lr: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(rates.get(name, 1.0), []).append(parameter)
    return [{"params": own, "lr": lr * rate, "rate": rate} for rate, own in groups.items()]
