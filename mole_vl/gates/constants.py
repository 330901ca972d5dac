"""Constant weights: the merges that everybody knows, as gates."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mole_vl.faults import refuse
from mole_vl.gates.gate import Gate, GateInput, GateSpec
from mole_vl.gates.output import GateOutput
from mole_vl.layers import MixtureLayer
from mole_vl.sites import Site


class ConstantGate(Gate):
    """The same weights at every call. Masked experts get zero; the kept stay, or share anew.

    Args:
        values: Weight of each expert, (E,).
        share: Whether the kept are renormalised to the whole sum.
    """

    constant = True
    values: Tensor

    def __init__(self, values: Tensor, share: bool) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.share = share

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ConstantGate":
        # A model cast to half precision keeps its weights as they were given.
        exact = self.values
        super()._apply(fn, recurse)
        self.values = exact.to(self.values.device)
        return self

    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """Weights (E,)."""
        weights = self.values
        if given.kept is not None:
            weights = weights * given.kept
            if self.share:
                weights = weights * (self.values.sum() / weights.sum())
        return GateOutput(weights, None, weights)


class _ConstantSpec(GateSpec):
    @property
    def reads_input(self) -> bool:
        """Whether the gate looks at the site's input: no."""
        return False

    def blind(self) -> GateSpec:
        """Itself: it never reads."""
        return self


@dataclass(frozen=True, kw_only=True)
class Sum(_ConstantSpec):
    """Weight 1 each: what loading several LoRAs at once does everywhere."""

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
        return ConstantGate(torch.ones(len(experts)), share=False)


@dataclass(frozen=True, kw_only=True)
class Average(_ConstantSpec):
    """Weight 1/E each (NLA, normalised linear arithmetic); with a mask, 1/kept each."""

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
        return ConstantGate(torch.full((len(experts),), 1 / len(experts)), share=True)


@dataclass(frozen=True, kw_only=True)
class LoRAHub(_ConstantSpec):
    """Weights found by black-box search (arXiv 2307.13269), see `mole_vl.training.search`.

    They start at 0, where the base speaks alone. Unlike the authors' code, whose weights multiply
    A and B both, they weigh Delta-W.
    """

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
        return ConstantGate(torch.zeros(len(experts)), share=False)


@dataclass(frozen=True, kw_only=True)
class Constants(_ConstantSpec):
    """Weights as given, for all sites or site by site.

    Args:
        weights: Weight of each expert by name.
        by_site: Other weights for some sites, by the site's name.

    Raises:
        ValueError: A weight is no finite number.
    """

    weights: Mapping[str, float]
    by_site: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [
            ("", self.weights),
            *((f" at {site!r}", own) for site, own in self.by_site.items()),
        ]
        refuse(
            "Constants",
            [
                f"the weight of {name!r}{where} is {weight}, expected a finite number"
                for where, weights in given
                for name, weight in weights.items()
                if not math.isfinite(float(weight))
            ],
        )

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
        values = self.by_site.get(site.name, self.weights)
        odd = sorted(set(values) ^ set(experts))
        if odd:
            raise ValueError(
                f"Constants for site {site.name!r}: weights are given for {', '.join(values)}; "
                f"the experts are {', '.join(experts)}; mend {', '.join(odd)}"
            )
        return ConstantGate(torch.tensor([float(values[name]) for name in experts]), share=False)
