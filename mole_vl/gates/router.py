"""Routers that learn with their experts: a score for each expert, and a choice of few.

A router scores the experts that change its site, by one linear map of what the site reads, and
gives each position to those that its choice takes.

| choice | experts of a position | their weights | paper |
|---|---|---|---|
| TopK(k) | the k likeliest | renormalised to sum 1 | MixLoRA, arXiv 2404.15159; MoLA, 2402.08562 |
| TopP(p) | the fewest whose shares sum to p | renormalised to sum 1 | arXiv 2403.07652 |
| Switch(capacity) | the likeliest, if it has room | its share | arXiv 2101.03961 |

Shape legend: lead = (rows, positions) or (rows,), d width, E experts, H experts that change the
site, K chosen ones.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_vl.draws import chances, keys_of
from mole_vl.faults import at_least, instance_of, one_of, positive, refuse, share
from mole_vl.gates.constants import Sum
from mole_vl.gates.gate import Gate, GateInput, GateSpec
from mole_vl.gates.output import NOBODY, GateOutput
from mole_vl.layers import MixtureLayer
from mole_vl.sites import Site

Start = Literal["normal", "uniform"]


class Choice:
    """Which of the experts a position goes to."""

    @abstractmethod
    def __call__(
        self, shares: Tensor, *, training: bool, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weights and places of the chosen experts.

        Args:
            shares: (lead, H), softmax over the experts; 0 for one that is masked out.
            training: Whether the router learns in this forward.
            real: Positions that are no padding, (rows, positions) bool; None where all are.

        Returns:
            weights (lead, K) and places (lead, K) long; where a place is `NOBODY` the weight is 0.
        """


def ranked(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Shares in falling order and their places, (lead, H) each; ties go to the lower index."""
    places = shares.detach().argsort(dim=-1, descending=True, stable=True)
    return shares.gather(-1, places), places


@dataclass(frozen=True, kw_only=True)
class TopK(Choice):
    """The k likeliest experts, their shares renormalised.

    Args:
        k: How many; all where fewer are there.
    """

    k: int = 2

    def __post_init__(self) -> None:
        refuse("TopK", [at_least("k", self.k, 1)])

    def __call__(
        self, shares: Tensor, *, training: bool, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As of `Choice`."""
        best, places = (one[..., : self.k] for one in ranked(shares))
        return best / best.sum(-1, keepdim=True), places.masked_fill(best == 0, NOBODY)


@dataclass(frozen=True, kw_only=True)
class TopP(Choice):
    """The fewest experts whose shares sum to at least p, renormalised.

    Args:
        p: The sum, below 1.
        renormalise: Whether their weights sum to 1, so that experts that change nothing leave the
            base as it is. MoE-PEFT weighs them by their shares alone.
    """

    p: float = 0.8
    renormalise: bool = True

    def __post_init__(self) -> None:
        refuse("TopP", [share("p", self.p), positive("p", self.p)])

    def __call__(
        self, shares: Tensor, *, training: bool, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As of `Choice`; K is the most that any position has."""
        best, places = ranked(shares)
        before = best.detach().cumsum(-1) - best.detach()
        taken = (before < self.p) & (best > 0)
        k = int(taken.sum(-1).max()) if taken.numel() else 1
        best, places = (best * taken)[..., :k], places[..., :k].masked_fill(~taken[..., :k], NOBODY)
        return (best / best.sum(-1, keepdim=True) if self.renormalise else best), places


@dataclass(frozen=True, kw_only=True)
class Switch(Choice):
    """The likeliest expert alone, weighed by its share, while it has room in the row.

    Args:
        capacity: How many positions of a row an expert takes in training, the first that come; the
            others get none. Otherwise all are taken: what one position gets must not hang on how
            many came with it.
    """

    capacity: int = 32

    def __post_init__(self) -> None:
        refuse("Switch", [at_least("capacity", self.capacity, 1)])

    def __call__(
        self, shares: Tensor, *, training: bool, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As of `Choice`."""
        best, places = (one[..., :1] for one in ranked(shares))
        if not training or places.dim() < 3:
            return best, places
        asked = F.one_hot(places.squeeze(-1), shares.shape[-1])
        if real is not None:
            asked = asked * real.unsqueeze(-1)
        queue = (asked.cumsum(1) * asked).sum(-1, keepdim=True)
        full = queue > self.capacity
        return best.masked_fill(full, 0.0), places.masked_fill(full, NOBODY)


class RouterGate(Gate):
    """`softmax(W x)` over the experts that change the site, and the choice among them.

    Args:
        weight: The linear map's start, (H, d).
        here: Which experts change the site, (E,) bool.
        choice: Takes some of them.
        jitter: In training, what the router reads is multiplied by U(1 - jitter, 1 + jitter).
        site: The site's name, which tells its jitter from other sites'.
    """

    places: Tensor

    def __init__(
        self, weight: Tensor, here: Tensor, choice: Choice, jitter: float, site: str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.experts = len(here)
        self.choice = choice
        self.jitter = jitter
        self.site = site
        self.register_buffer("places", here.nonzero().squeeze(-1), persistent=False)

    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """Weights (lead, K), places (lead, K) among all E experts, logits (lead, E).

        The logit of an expert that does not change the site is minus infinity.
        """
        assert given.x is not None
        x = given.x.float()
        if self.training and self.jitter:
            x = x * (1 + self.jitter * (2 * self._chances(x, given.seeds) - 1))
        logits = F.linear(x, self.weight.float())
        everywhere = logits.new_full((*logits.shape[:-1], self.experts), -math.inf)
        everywhere = everywhere.index_copy(-1, self.places, logits)
        kept = None if given.kept is None else given.kept[self.places]
        if kept is not None and not kept.any():
            nobody = torch.full_like(logits[..., :1], NOBODY, dtype=torch.long)
            return GateOutput(logits[..., :1] * 0.0, nobody, everywhere)
        seen = logits if kept is None else logits.masked_fill(~kept, -math.inf)
        weights, chosen = self.choice(seen.softmax(-1), training=self.training, real=given.real)
        places = self.places[chosen.clamp_min(0)].masked_fill(chosen == NOBODY, NOBODY)
        return GateOutput(weights, places, everywhere)

    def _chances(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        if seeds is None:
            return torch.rand_like(x)
        lead = x.shape[:-1]
        return chances(keys_of(seeds, self.site, lead[1:].numel()).view(lead), x.shape[-1])

    def extra_repr(self) -> str:
        """What `print` says of the gate."""
        return f"{self.choice}, jitter={self.jitter}"


@dataclass(frozen=True, kw_only=True)
class Router(GateSpec):
    """A router at each site, over the experts that change it; it learns with them.

    Experts of layers where no router reads speak in full.

    Args:
        choice: TopK, TopP or Switch.
        jitter: In training, the router's input is multiplied by U(1 - jitter, 1 + jitter).
        start: normal: N(0, spread^2), MixLoRA's; uniform: as torch's linear layers start, MoLA's.
        spread: Standard deviation of the normal start.
        seed: Of the start, which differs by site.
    """

    choice: Choice = TopK()
    jitter: float = 0.0
    start: Start = "normal"
    spread: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(
            "Router",
            [
                instance_of("choice", self.choice, Choice),
                share("jitter", self.jitter),
                one_of("start", self.start, get_args(Start)),
                positive("spread", self.spread),
                at_least("seed", self.seed, 0),
            ],
        )

    @property
    def reads_input(self) -> bool:
        """Whether the gate looks at the site's input: yes."""
        return True

    def blind(self) -> GateSpec:
        """The sum: where nobody chooses, all speak."""
        return Sum()

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module.

        Raises:
            ValueError: Slots: a router knows its experts.
        """
        here = torch.tensor([name in site.experts for name in experts])
        if not here.any():
            raise ValueError(
                f"Router: none of {', '.join(experts)} is an expert of {site.name}; a router "
                "scores experts, not slots"
            )
        generator = torch.Generator().manual_seed(crc32(site.name.encode()) + self.seed)
        weight = torch.empty(int(here.sum()), site.width)
        if self.start == "normal":
            weight.normal_(0.0, self.spread, generator=generator)
        else:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        return RouterGate(weight, here, self.choice, self.jitter, site.name)
