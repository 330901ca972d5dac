"""Positions fanned out to their experts, for a module that runs once for each.

Shape legend: n positions, m positions times their experts, E experts, H experts of a site, K chosen
ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_vl.draws import dropped, keys_of, keys_of_choices
from mole_vl.plans import align
from mole_vl.sparse import Groups, products


class Fanned(NamedTuple):
    """The positions of one forward, grouped by expert; the last group is the base's own.

    Args:
        x: Every position once, (n, width).
        groups: Of the site's H experts and the base.
        held: How many of the m the experts have; the base has those behind.
        site: The places of the site's experts among all, (H,).
        strength: Multiplies every expert's update.
        lead: The input's leading axes.
        seeds: Of the rows, as of `mole_vl.draws`; None where they have none.
    """

    x: Tensor
    groups: Groups
    held: int
    site: tuple[int, ...]
    strength: float | Tensor
    lead: torch.Size
    seeds: Tensor | None

    @property
    def inputs(self) -> Tensor:
        """What the module reads: the positions as those of one row, (1, m, width)."""
        return self.of_positions(self.x).unsqueeze(0)

    def of_positions(self, values: Tensor) -> Tensor:
        """What belongs to the positions, (n, d), for each time that one stands here, (m, d)."""
        # Not by brackets: the gradient of those adds up one by one, several times as slowly.
        return values.index_select(0, self.groups.places)

    def dropout(self, x: Tensor, share: float, name: str) -> Tensor:
        """Dropout of what the experts of a layer read, (1, m, i), each by its row's chance.

        Args:
            x: What they read.
            share: Which share of its numbers is zero.
            name: The layer's.
        """
        if self.seeds is None:
            return F.dropout(x, share)
        keys = keys_of(self.seeds, name, self.lead[1:].numel()).flatten()
        own = keys_of_choices(keys[self.groups.places], self.groups.choices)
        return dropped(x, share, own.unsqueeze(0))

    def updates(
        self, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, ranks: Sequence[int]
    ) -> Tensor:
        """Every expert's update of what it reads, unweighed; zeros for the base.

        Args:
            x: What the experts of a layer read, (1, m, i).
            a: The layer's stacked down projections, (R, i).
            b: Its stacked up projections, (o, R).
            scales: Each of all experts' scale, (E,).
            ranks: Each of all experts' rank.

        Returns:
            (1, m, o).
        """
        own = torch.tensor(self.site, device=scales.device)
        found = products(
            self.of_held(x).squeeze(0),
            a,
            b,
            (scales[own] * self.strength)[self.groups.experts[: self.held]].unsqueeze(1),
            self.groups.ends[:-1],
            [ranks[place] for place in self.site],
        )
        return self.with_base(found.unsqueeze(0))

    def of_held(self, values: Tensor) -> Tensor:
        """What the experts have, (1, held, d), without what the base has behind, (1, m, d)."""
        # Not cut where nothing is cut off: the gradient of a cut fills a tensor with zeros first.
        return values if self.held == len(self.groups.places) else values[:, : self.held]

    def with_base(self, values: Tensor) -> Tensor:
        """What the experts have, (1, held, d), and zeros for the base behind, (1, m, d)."""
        left = len(self.groups.places) - self.held
        return F.pad(values, (0, 0, 0, left)) if left else values

    def of_experts(self, values: Tensor) -> Tensor:
        """Values of all experts (E, d) for what each of them reads, the strength in them: (m, d).

        Zeros for the base.
        """
        own = values[torch.tensor(self.site, device=values.device)] * self.strength
        return F.pad(own, (0, 0, 0, 1)).index_select(0, self.groups.experts)

    def summed(self, values: Tensor) -> Tensor:
        """Weighted sum of (1, m, d) over what each position has, (1, n, d)."""
        weighed = values * self.groups.weights.to(values.dtype)
        y = weighed.new_zeros(1, len(self.x), values.shape[-1])
        return y.index_add(1, self.groups.places, weighed)

    def unfolded(self, y: Tensor) -> Tensor:
        """(1, n, d) as the module's output, (..., d)."""
        return y.view(*self.lead, y.shape[-1])


def fan(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor | None,
    site: Sequence[int],
    strength: float | Tensor,
    seeds: Tensor | None,
    where: str,
) -> Fanned:
    """Fan positions out.

    Args:
        x: Input of the module, (..., width).
        weights: As of a gate's output, (E,), (rows, K) or (rows, positions, K).
        chosen: Which experts, like `weights`, below 0 for nobody: a position without any is the
            base's. None for all E in order: what their weights lack to 1 is the base's.
        site: The places of the site's H experts among all.
        strength: Multiplies every expert's update.
        seeds: Of the rows, (rows,) int64; None where they have none.
        where: The module's path, for messages.

    Raises:
        ValueError: The weights vary over rows or positions that the input does not have.
    """
    lead, own = x.shape[:-1], torch.tensor(tuple(site), device=x.device)
    base = len(own)
    if chosen is None:
        weights = weights[..., own]
        chosen = torch.arange(base, device=x.device).expand(weights.shape)
        rest, whose = 1 - weights.sum(-1, keepdim=True), torch.full_like(chosen[..., :1], base)
    else:
        # Those that leave the module alone are nobody here.
        local = chosen.unsqueeze(-1) == own
        chosen = torch.where(local.any(-1), local.int().argmax(-1), -1)
        none = (chosen < 0).all(-1, keepdim=True)
        rest, whose = none.to(weights.dtype), torch.where(none, base, -1)
    weights_nk, chosen_nk = (
        align(one, x, where).expand(*lead, -1).reshape(-1, one.shape[-1])
        for one in (torch.cat([weights, rest], -1), torch.cat([chosen, whose], -1))
    )
    groups = Groups.of(weights_nk, chosen_nk, base + 1)
    held = int(groups.ends[-2]) if base else 0
    return Fanned(x.reshape(-1, x.shape[-1]), groups, held, tuple(site), strength, lead, seeds)
