"""Nearest centroid: a row goes to the experts whose own rows look most like it to the base.

No training: an expert's centroid is the mean of what the base makes of rows of the expert's task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_vl.faults import at_least, positive, refuse
from mole_vl.gates.arrow import top_softmax
from mole_vl.gates.constants import Average
from mole_vl.gates.gate import Gate, GateInput, GateSpec
from mole_vl.gates.output import GateOutput
from mole_vl.gates.pooling import pooled_mean
from mole_vl.layers import MixtureLayer
from mole_vl.sites import Site

# A distance of centroids, of features of length 1, that is rounding.
_NOTHING = 1e-6


class CentroidGate(Gate):
    """Softmax over the cosines of a row's features to centroids, both seen from a centre.

    Args:
        experts: E.
        width: Width of the site's input, d.
        top_k: How many experts of a row get weights; None for all.
        tau: Temperature of the softmax.
    """

    centroids: Tensor
    centre: Tensor

    def __init__(self, experts: int, width: int, top_k: int | None, tau: float) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(experts, width))
        self.register_buffer("centre", torch.zeros(width))
        self.top_k = top_k
        self.tau = tau

    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """Weights (rows, E); zero for experts without a centroid."""
        assert given.x is not None
        seen = F.normalize(row_features(given.x, given.pool) - self.centre.float(), dim=-1)
        logits = F.linear(seen, self.centroids.float())
        here = self.centroids.any(-1)
        kept = here if given.kept is None else here & given.kept
        return GateOutput(top_softmax(logits / self.tau, kept, self.top_k), None, logits)

    def extra_repr(self) -> str:
        """What `print` says of the gate."""
        return f"top_k={self.top_k}, tau={self.tau}"


def row_features(x: Tensor, pool: Tensor | None) -> Tensor:
    """A row's direction, (rows, d) of length 1, in fp32: what centroids are means of.

    Each pooled position counts by its direction alone: a few of giant norm would drown the others.

    Args:
        x: (rows, positions, d) or (rows, d).
        pool: Positions that count, (rows, positions) bool; None for all.
    """
    return F.normalize(pooled_mean(x, pool).float(), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Nearest(GateSpec):
    """Each row goes to the experts of the nearest centroids, by cosine.

    The gates start without centroids, where nobody speaks: `take_centroids` gives them theirs. At
    site `preview` they read what centroids are made of, the base's states without experts; at the
    others the experts before them have spoken.

    Args:
        top_k: How many experts of a row get weights; None for all.
        tau: Temperature of the softmax over their cosines.
    """

    top_k: int | None = 1
    tau: float = 0.1

    def __post_init__(self) -> None:
        refuse("Nearest", [at_least("top_k", self.top_k, 1), positive("tau", self.tau)])

    @property
    def reads_input(self) -> bool:
        """Whether the gate looks at the site's input: yes."""
        return True

    def blind(self) -> GateSpec:
        """The average: there is nothing to compare with."""
        return Average()

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module, without centroids."""
        return CentroidGate(len(experts), site.width, self.top_k, self.tau)


@torch.no_grad()
def take_centroids(
    gates: Mapping[str, Gate], names: Sequence[str], found: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Give `Nearest` gates the mean features of each expert's rows.

    States of one site point nearly the same way, whatever the row; so rows and centroids are
    compared as seen from the experts' common mean.

    Args:
        gates: The gates by the path of the module whose input they read (`Site.entry`); gates of
            other kinds are left alone.
        names: The experts in order.
        found: The mean (d,) of `row_features` over an expert's rows, by path, by expert.

    Raises:
        ValueError: An expert without a mean at one of the gates, one of another width, or one that
            is the mean of all. No gate has changed then.
    """
    own = {path: gate for path, gate in gates.items() if isinstance(gate, CentroidGate)}
    refuse(
        "take_centroids",
        [
            None if own else "none of the gates is Nearest",
            *(
                f"{name} has no centroid at {path}"
                if path not in found.get(name, {})
                else f"{name}'s centroid at {path} is of shape {tuple(found[name][path].shape)}, "
                f"expected {tuple(gate.centre.shape)}"
                for path, gate in own.items()
                for name in names
                if path not in found.get(name, {}) or found[name][path].shape != gate.centre.shape
            ),
        ],
    )
    seen = {}
    for path in own:
        means = torch.stack([found[name][path] for name in names]).float()
        centre = means.mean(0) if len(names) > 1 else torch.zeros_like(means[0])
        seen[path] = centre, means - centre
        lost = [
            name for name, way in zip(names, means - centre, strict=True) if way.norm() < _NOTHING
        ]
        if lost:
            raise ValueError(
                f"take_centroids: at {path} the centroid of {lost[0]} is the mean of all: its rows "
                "cannot be told from the others'"
            )
    for path, (centre, directions) in seen.items():
        own[path].centre.copy_(centre)
        own[path].centroids.copy_(F.normalize(directions, dim=-1))
