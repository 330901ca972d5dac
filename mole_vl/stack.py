"""The factors of a layer's experts, stacked along one rank axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl.experts import Factors
from mole_vl.faults import at_least, refuse, share


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How experts learn inside their mixture.

    Args:
        dropout: Share of what an expert's down projection reads that a training step leaves out.
        teams: How many experts, in their order, share each tensor of weights: those of a team are
            updated together. All are one team if not given.
    """

    dropout: float = 0.0
    teams: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        refuse(
            "Learning",
            [
                share("dropout", self.dropout),
                *(at_least("teams", size, 1) for size in self.teams or ()),
            ],
        )

    def places(self, experts: int) -> list[range]:
        """Places of each team's experts.

        Raises:
            ValueError: The teams have more or fewer experts in all.
        """
        sizes = (experts,) if self.teams is None else self.teams
        if sum(sizes) != experts:
            raise ValueError(
                f"Learning: the teams have {sum(sizes)} experts in all, the mixture {experts}"
            )
        return [range(*ends) for ends in pairwise(accumulate(sizes, initial=0))]


class Stack(nn.Module):
    """All experts' A and B of one layer; both lie by rank, so that an expert's are contiguous.

    Frozen factors are buffers outside `state_dict`. Those that learn are parameters, one pair for
    each team.

    Args:
        factors: One per expert in order; None where an expert leaves the layer alone.
        learning: How they learn; None for frozen ones.
        place: Device and type of the tensors.
    """

    down: Tensor
    up: Tensor

    def __init__(
        self, factors: Sequence[Factors | None], learning: Learning | None, place: dict[str, Any]
    ) -> None:
        super().__init__()
        self.learns = learning is not None
        teams = (learning or Learning()).places(len(factors))
        present = {
            team: own
            for team, places in enumerate(teams)
            if (own := [f for f in map(factors.__getitem__, places) if f is not None])
        }
        downs = {t: torch.cat([f.a.to(**place) for f in own]) for t, own in present.items()}
        ups = {t: torch.cat([f.b.to(**place).T for f in own]) for t, own in present.items()}
        if not self.learns:
            self.register_buffer("down", downs[0], persistent=False)
            self.register_buffer("up", ups[0], persistent=False)
            return
        self.downs = nn.ParameterDict({str(t): nn.Parameter(one) for t, one in downs.items()})
        self.ups = nn.ParameterDict({str(t): nn.Parameter(one) for t, one in ups.items()})

    @property
    def a(self) -> Tensor:
        """All down projections, (R, in) or (R, in, h, w)."""
        return joined(self.downs) if self.learns else self.down

    @property
    def b(self) -> Tensor:
        """All up projections, (out, R); a view of them as they lie, (R, out)."""
        return (joined(self.ups) if self.learns else self.up).T


def joined(parts: nn.ParameterDict) -> Tensor:
    """The teams' tensors in one."""
    tensors = list(parts.values())
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
