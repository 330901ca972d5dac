"""Normalisers: from scores to weights. At zero score each is a plain merge of the experts.

| normaliser | weights at zero score | with k of E experts kept |
|---|---|---|
| Softmax | 1/E each (the average, NLA) | the kept renormalise to sum 1 |
| ScaledSoftmax | total/E each (the plain sum for total = E) | the total shrinks to total k/E |
| Sigmoid | 1 each (the plain sum) | the kept do not change |
"""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mole_vl.faults import positive, refuse


class Normaliser(nn.Module):
    """Maps scores (..., E) to weights (..., E).

    A mask of the experts kept, (E,) bool, is as if there were no others; of the experts chosen,
    (..., E) bool, those alone share what all would have had. None for all.
    """

    def __init__(self, spec: "NormaliserSpec") -> None:
        super().__init__()
        self.spec = spec

    def extra_repr(self) -> str:
        """The specification that it was built from."""
        return str(self.spec)

    @abstractmethod
    def forward(
        self, logits: Tensor, kept: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """Weights of the experts; one that is not kept, or not chosen, has exactly zero."""


class _Temperature(nn.Module):
    """A learned temperature that stays within [low, high] and starts at their geometric mean."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.position = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        span = math.log(self.high / self.low)
        return (math.log(self.low) + span * self.position.sigmoid()).exp()


class _SoftmaxNormaliser(Normaliser):
    def __init__(self, spec: "Softmax | ScaledSoftmax", total: float | None) -> None:
        super().__init__(spec)
        self.temperature = _Temperature(spec.tau_low, spec.tau_high)
        self.total = total

    def forward(
        self, logits: Tensor, kept: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        scores = logits / self.temperature()
        for mask in (kept, chosen):
            # After the division: an infinite score would leave the temperature no gradient.
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1)
        if self.total is None:
            return weights
        part = 1.0 if kept is None else kept.float().mean()
        return weights * (self.total * part)


class _SigmoidNormaliser(Normaliser):
    def __init__(self, spec: "Sigmoid") -> None:
        super().__init__(spec)
        self.top = spec.top

    def forward(
        self, logits: Tensor, kept: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        # Zero score gives weight 1 for any top: the sigmoid is shifted to pass 1/top there.
        shift = -math.log(self.top - 1)
        weights = self.top * torch.sigmoid(logits + shift)
        for mask in (kept, chosen):
            weights = weights if mask is None else weights * mask
        return weights


class NormaliserSpec:
    """A normaliser to be built for a number of experts."""

    @abstractmethod
    def build(self, experts: int) -> Normaliser:
        """The normaliser as a module."""


def _temperature_faults(low: float, high: float) -> list[str | None]:
    return [
        positive("tau_low", low),
        positive("tau_high", high),
        None if high > low else f"tau_high is {high}, expected more than tau_low = {low}",
    ]


@dataclass(frozen=True, kw_only=True)
class Softmax(NormaliserSpec):
    """Softmax with a learned temperature (MoLE, arXiv 2404.13628, eq. 6).

    Args:
        tau_low: Least temperature.
        tau_high: Greatest temperature; training starts at the geometric mean of the two.
    """

    tau_low: float = 0.25
    tau_high: float = 4.0

    def __post_init__(self) -> None:
        refuse("Softmax", _temperature_faults(self.tau_low, self.tau_high))

    def build(self, experts: int) -> Normaliser:
        """The normaliser as a module."""
        return _SoftmaxNormaliser(self, None)


@dataclass(frozen=True, kw_only=True)
class ScaledSoftmax(NormaliserSpec):
    """Softmax times a fixed total: experts share more than one expert's strength.

    Args:
        total: Sum of the weights; None for the number of experts, whose start is the plain sum.
        tau_low: Least temperature.
        tau_high: Greatest temperature.
    """

    total: float | None = None
    tau_low: float = 0.25
    tau_high: float = 4.0

    def __post_init__(self) -> None:
        faults = _temperature_faults(self.tau_low, self.tau_high)
        refuse("ScaledSoftmax", [positive("total", self.total), *faults])

    def build(self, experts: int) -> Normaliser:
        """The normaliser as a module."""
        total = float(experts) if self.total is None else self.total
        return _SoftmaxNormaliser(self, total)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(NormaliserSpec):
    """Each expert on its own, between 0 and `top`: experts do not compete.

    Args:
        top: Greatest weight, more than 1.
    """

    top: float = 2.0

    def __post_init__(self) -> None:
        refuse("Sigmoid", [None if self.top > 1 else f"top is {self.top}, expected more than 1"])

    def build(self, experts: int) -> Normaliser:
        """The normaliser as a module."""
        return _SigmoidNormaliser(self)
