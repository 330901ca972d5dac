"""Arrow: routing without training, by each expert's own direction (arXiv 2405.11157)."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_vl.faults import at_least, positive, refuse
from mole_vl.gates.constants import Average
from mole_vl.gates.gate import Gate, GateInput, GateSpec
from mole_vl.gates.output import GateOutput
from mole_vl.gates.topk import highest
from mole_vl.layers import MixtureLayer, MixtureLinear
from mole_vl.lowrank import top_input
from mole_vl.sites import Site


class PrototypeGate(Gate):
    """Softmax over the experts whose prototypes a position is most along, in either direction.

    Args:
        prototypes: A direction of length 1 for each expert, (E, d); zeros for an expert that is not
            here: it gets no weight.
        top_k: How many experts of a position get weights; None for all.
        tau: Temperature of the softmax.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor, top_k: int | None, tau: float) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes)
        self.top_k = top_k
        self.tau = tau

    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """Weights like the input's leading axes, (..., E)."""
        assert given.x is not None
        logits = self.scores(given.x.float())
        here = self.prototypes.any(-1)
        kept = here if given.kept is None else here & given.kept
        return GateOutput(top_softmax(logits / self.tau, kept, self.top_k), None, logits)

    def scores(self, x: Tensor) -> Tensor:
        """`abs(x . prototype)`, (..., E)."""
        return F.linear(x, self.prototypes.float()).abs()

    def extra_repr(self) -> str:
        """What `print` says of the gate."""
        return f"top_k={self.top_k}, tau={self.tau}"


def top_softmax(logits: Tensor, kept: Tensor, k: int | None) -> Tensor:
    """Softmax over the k highest of the kept experts' scores, zero for the others.

    Ties go to the lower index. Where nobody is kept all weights are zero.

    Args:
        logits: (..., E).
        kept: (E,) bool.
        k: None for all.
    """
    if not kept.any():
        return torch.zeros_like(logits)
    logits = logits.masked_fill(~kept, -math.inf)
    if k is not None:
        logits = logits.masked_fill(~highest(logits, k), -math.inf)
    return logits.softmax(-1)


class ByPosition(GateSpec):
    """A gate of one linear layer whose weights vary by position."""

    @property
    def reads_input(self) -> bool:
        """Whether the gate looks at the site's input: yes."""
        return True

    def blind(self) -> GateSpec:
        """The average: there is nothing to compare with."""
        return Average()


@dataclass(frozen=True, kw_only=True)
class Directed(ByPosition):
    """Each position goes to the experts whose own direction it is most along.

    For site `matrix`, linear layers.

    Args:
        top_k: How many experts of a position get weights, of those that change the layer; None for
            all.
        tau: Temperature of the softmax over the scores.
    """

    top_k: int | None
    tau: float = 1.0

    def __post_init__(self) -> None:
        faults = [at_least("top_k", self.top_k, 1), positive("tau", self.tau)]
        refuse(type(self).__name__, faults)

    @abstractmethod
    def gate(self, layer: MixtureLinear) -> Gate:
        """The gate of a layer."""

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one layer as a module.

        Raises:
            ValueError: A site of more than one layer, a convolution, or slots.
        """
        return self.gate(only_linear(type(self).__name__, site, matrices, experts))


@dataclass(frozen=True, kw_only=True)
class Arrow(Directed):
    """Each position goes to the experts whose update would answer it most: nothing is trained.

    An expert's prototype at a layer is the top right singular vector of its Delta-W there, the
    input direction that it amplifies most; ranks may differ. Scores are `abs(x . prototype)`.

    Args:
        top_k: As for `Directed`.
        tau: As for `Directed`.
    """

    top_k: int | None = 3

    def gate(self, layer: MixtureLinear) -> Gate:
        """The gate of a layer, by its experts' prototypes."""
        return PrototypeGate(prototypes(layer), self.top_k, self.tau)


@dataclass(frozen=True, kw_only=True)
class KeptArrow(Directed):
    """`Arrow` by prototypes that were computed before, such as those that a library keeps.

    The gates start without prototypes, where nobody speaks: `take_directions` gives them theirs
    (`mole_vl.prototypes.prototypes_of`), and nothing is decomposed anew.

    Args:
        top_k: As for `Directed`.
        tau: As for `Directed`.
    """

    top_k: int | None = 3

    def gate(self, layer: MixtureLinear) -> Gate:
        """The gate of a layer, without prototypes."""
        nothing = torch.zeros(len(layer.ranks), layer.in_features)
        return PrototypeGate(nothing, self.top_k, self.tau)


def only_linear(
    kind: str, site: Site, matrices: Sequence[MixtureLayer], experts: Sequence[str]
) -> MixtureLinear:
    """The one linear layer of a site, whose experts the gate weighs.

    Raises:
        ValueError: A site of more than one layer, a convolution, or slots.
    """
    if site.matrices != (site.name,):
        raise ValueError(
            f"{kind} routes each layer by itself, and site {site.name!r} holds "
            f"{len(site.matrices)}: use site='matrix'"
        )
    if not isinstance(matrices[0], MixtureLinear):
        raise ValueError(
            f"{kind}'s weights vary by position, and {site.name} is a convolution, which mixes "
            "positions: use a gate over rows, or experts that leave it alone"
        )
    if len(matrices[0].ranks) != len(experts):
        raise ValueError(
            f"{kind}: a direction is one expert's own, and a slot has many; use Hidden or Free for "
            "gates over slots"
        )
    return matrices[0]


def prototypes(layer: MixtureLayer) -> Tensor:
    """Top right singular vector of each expert's Delta-W, (E, in); zeros where it has none."""
    found = torch.zeros(len(layer.ranks), layer.in_features, device=layer.a.device)
    for expert in range(len(layer.ranks)):
        mine = layer.segments == expert
        direction = top_input(layer.b[:, mine], layer.a[mine])
        if direction is not None:
            found[expert] = direction.float()
    return found
