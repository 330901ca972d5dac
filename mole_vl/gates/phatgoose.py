"""PHATGOOSE: a short training of a gate for each expert alone, then routing among all.

Post-hoc adaptive tokenwise gating over an ocean of specialised experts (arXiv 2402.05859).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_vl.faults import refuse
from mole_vl.gates.arrow import ByPosition, Directed, PrototypeGate, only_linear
from mole_vl.gates.gate import Gate, GateInput
from mole_vl.gates.output import GateOutput
from mole_vl.layers import MixtureLayer, MixtureLinear
from mole_vl.sites import Site


class UsefulnessGate(Gate):
    """`sigmoid(x . v)` for the one expert of a mixture, with `v` (1, d) learned from zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.zeros(1, width))

    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """Weights (..., 1) like the input's leading axes; 1/2 at the start."""
        assert given.x is not None
        logits = F.linear(given.x.float(), self.direction.float())
        weights = logits.sigmoid()
        return GateOutput(weights if given.kept is None else weights * given.kept, None, logits)


@dataclass(frozen=True, kw_only=True)
class Usefulness(ByPosition):
    """Where one expert, alone in its mixture, helps: PHATGOOSE's training. For site `matrix`."""

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one layer as a module.

        Raises:
            ValueError: More than one expert, a site of more than one layer, or a convolution.
        """
        if len(experts) != 1:
            raise ValueError(
                f"Usefulness is learned for one expert alone, and the mixture has {len(experts)}: "
                "mix each by itself, then all with Phatgoose()"
            )
        return UsefulnessGate(only_linear("Usefulness", site, matrices, experts).in_features)


class PhatgooseGate(PrototypeGate):
    """Softmax over the experts whose learned directions a position is most along."""

    def scores(self, x: Tensor) -> Tensor:
        """`x . v / sqrt(d)`, both standardised: (..., E)."""
        width = (x.shape[-1],)
        x, directions = F.layer_norm(x, width), F.layer_norm(self.prototypes.float(), width)
        return F.linear(x, directions) / width[0] ** 0.5


@dataclass(frozen=True, kw_only=True)
class Phatgoose(Directed):
    """Each position goes to the experts whose own gates find themselves most useful there.

    The gates start without directions, where nobody speaks: `take_directions` gives them those that
    `Usefulness` gates learned, one expert at a time.

    Args:
        top_k: As for `Directed`.
        tau: As for `Directed`.
    """

    top_k: int | None = 2

    def gate(self, layer: MixtureLinear) -> Gate:
        """The gate of a layer, without directions."""
        directions = torch.zeros(len(layer.ranks), layer.in_features)
        return PhatgooseGate(directions, self.top_k, self.tau)


@torch.no_grad()
def take_directions(
    gates: Mapping[str, Gate], names: Sequence[str], learned: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Give `Phatgoose` gates the directions that each expert learned alone.

    `Arrow` gates likewise take prototypes that were kept (`mole_vl.prototypes.prototypes_of`).

    Args:
        gates: The gates by site.
        names: The experts in order.
        learned: A direction (1, d) or (d,) by site, by expert; an expert that leaves a layer alone
            has none there, and gets no weight.

    Raises:
        ValueError: An expert without any, or directions for sites that the mixture lacks.
    """
    missing = [name for name in names if not learned.get(name)]
    strange = {site for sites in learned.values() for site in sites} - gates.keys()
    refuse(
        "take_directions",
        [
            f"nothing was learned for {', '.join(missing)}" if missing else None,
            f"directions are for {sorted(strange)[0]}, where no gate is" if strange else None,
        ],
    )
    for site, gate in gates.items():
        assert isinstance(gate, PrototypeGate)
        for place, name in enumerate(names):
            if site in learned[name]:
                gate.prototypes[place] = learned[name][site].flatten()
