"""The gate's interface, and the specification that builds one for each site."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mole_vl.gates.output import GateOutput
from mole_vl.layers import MixtureLayer
from mole_vl.sites import Site


@dataclass(frozen=True)
class GateInput:
    """What a gate may read in one call.

    Args:
        x: The site's input, (rows, positions, width) or (rows, width); None for a gate that reads
            nothing.
        pool: Positions that a row's features average over, (rows, positions) bool; None for all.
        kept: Experts that are not masked out, (E,) bool; None for all.
        features: What the model itself was told of each row, (rows, features); None for a site
            without.
        real: Positions that are no padding, (rows, positions) bool; None for all.
        tenant: The number of each row's tenant, (rows,); None where there are no tenants.
        seeds: What each row's chance is drawn from, (rows,) int64; None for torch's own generator.
    """

    x: Tensor | None
    pool: Tensor | None = None
    kept: Tensor | None = None
    features: Tensor | None = None
    real: Tensor | None = None
    tenant: Tensor | None = None
    seeds: Tensor | None = None


class Gate(nn.Module):
    """Weights of a site's experts for one call. It returns all it knows and keeps nothing."""

    constant = False
    """Whether its weights are the same at every call."""

    @abstractmethod
    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """The weights; `matrices` are the site's layers that read the site's width."""


Previewed = Literal["base", "average"]


class GateSpec:
    """A kind of gate. One is built for each site of a mixture.

    Its `preview` is what site preview shows it: the base alone, or under the experts' average.
    """

    preview: Previewed = "base"

    @abstractmethod
    def blind(self) -> "GateSpec":
        """This kind of gate for a site that runs too early to read: its weights are constant."""

    @property
    @abstractmethod
    def reads_input(self) -> bool:
        """Whether the gate looks at the site's input."""

    @property
    def takes_features(self) -> bool:
        """Whether the gate can be conditioned on what the model itself is told."""
        return False

    @abstractmethod
    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
