"""Scores: from what a site reads to one number per expert. Every score starts at zero.

Shape legend: lead = (rows,) or (rows, positions), d width, E experts, R rank summed over experts.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_vl.faults import one_of, refuse
from mole_vl.gates.pooling import last_pooled, max_pooled, pooled_mean
from mole_vl.layers import MixtureLayer

Pooled = Literal["mean", "max", "last"]
_POOLED = {"mean": pooled_mean, "max": max_pooled, "last": last_pooled}


class Score(nn.Module):
    """Maps a site's input (lead, d) to logits (lead, E), in fp32."""

    def pooled(self, x: Tensor, pool: Tensor | None) -> Tensor:
        """What a gate over rows shows of the input: (rows, positions, d) to (rows, d)."""
        return pooled_mean(x, pool)

    @abstractmethod
    def forward(self, x: Tensor, matrices: Sequence[MixtureLayer]) -> Tensor:
        """Logits of the experts; `matrices` are the site's layers."""


class ScoreSpec:
    """A score to be built for one site."""

    reads_input: bool = True

    @abstractmethod
    def build(self, experts: int, width: int, matrices: Sequence[MixtureLayer]) -> Score:
        """The score as a module, at zero."""


class HiddenScore(Score):
    """Linear in the input's direction as seen from `centre`, (d,), which is zero until it is set.

    Hidden states of one site point nearly the same way, whatever the input (cosine 0.9 and more in
    language models): from their common mean the differences are what remains. What is pooled of a
    row stands side by side, (rows, parts d), each part of size 1.
    """

    centre: Tensor

    def __init__(self, experts: int, width: int, pool: Sequence[Pooled] = ("mean",)) -> None:
        super().__init__()
        self.pool = pool
        self.parts = len(pool)
        self.weight = nn.Parameter(torch.zeros(experts, self.parts * width))
        self.bias = nn.Parameter(torch.zeros(experts))
        self.register_buffer("centre", torch.zeros(self.parts * width))

    def pooled(self, x: Tensor, pool: Tensor | None) -> Tensor:
        """What is pooled of a row's positions, side by side: (rows, parts d)."""
        # The mean checks the mask for all.
        mean = pooled_mean(x, pool)
        parts = [mean if part == "mean" else _POOLED[part](x, pool) for part in self.pool]
        return torch.cat(parts, -1)

    def features(self, x: Tensor) -> Tensor:
        """The input's direction, part by part: what the centre is a mean of."""
        return unit_sized(x.float().unflatten(-1, (self.parts, -1))).flatten(-2)

    def forward(self, x: Tensor, matrices: Sequence[MixtureLayer]) -> Tensor:
        """Logits of the experts."""
        features = self.features(self.features(x) - self.centre.float())
        return F.linear(features, self.weight.float(), self.bias.float())


def unit_sized(x: Tensor) -> Tensor:
    """L2-normalised times sqrt(d): features of size 1 each, whatever the width."""
    return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])


class _ResponseScore(Score):
    """`W . normalise(concat_m,e s_e B_e A_e x)` without the concatenation.

    With `h = A x`, the product with W's part for matrix m is `h . P` with `P = (s B)^T W^T`, and
    the norm is `h . G h` with the Gram matrix G of each expert's `s_e B_e`: nothing of the size
    experts x out_features is built for any position.
    """

    def __init__(self, experts: int, matrices: Sequence[MixtureLayer]) -> None:
        super().__init__()
        self.experts = experts
        out = sum(m.out_features for m in matrices)
        self.features = experts * out
        # One (E, E * out) weight: for each expert scored, each expert's response, matrix by matrix.
        self.weight = nn.Parameter(torch.zeros(experts, experts, out))
        self.bias = nn.Parameter(torch.zeros(experts))

    def forward(self, x: Tensor, matrices: Sequence[MixtureLayer]) -> Tensor:
        numerator = torch.zeros((), device=x.device)
        square = torch.zeros((), device=x.device)
        parts = self.weight.float().split([m.out_features for m in matrices], dim=-1)
        for matrix, part in zip(matrices, parts, strict=True):
            hidden_R = F.linear(x.float(), matrix.reading.float())
            columns_oR = matrix.b.float() * matrix.scales
            # Rank j belongs to expert segments[j]: it meets that expert's slice of W.
            product_ER = torch.einsum("fjo,oj->fj", part[:, matrix.segments], columns_oR)
            numerator = numerator + hidden_R @ product_ER.T
            gram_RR = matrix.responses_gram()
            square = square + ((hidden_R @ gram_RR) * hidden_R).sum(-1, keepdim=True)
        norm = square.clamp_min(1e-12).sqrt()
        return numerator * (math.sqrt(self.features) / norm) + self.bias.float()


class _FreeScore(Score):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(experts))

    def forward(self, x: Tensor, matrices: Sequence[MixtureLayer]) -> Tensor:
        return self.logits.float()


@dataclass(frozen=True, kw_only=True)
class Hidden(ScoreSpec):
    """Reads the site's input, L2-normalised (the MoLE authors' code), seen from its `centre`.

    Args:
        pool: What a gate over rows reads of a row, side by side: the mean of its positions, the
            largest (number by number), the last one, which in a causal model has read all others.
    """

    pool: tuple[Pooled, ...] = ("mean",)

    def __post_init__(self) -> None:
        if not isinstance(self.pool, tuple | list):
            raise ValueError(f"Hidden: pool is {self.pool!r}, expected a list of mean, max, last")
        # A gate file has a list.
        object.__setattr__(self, "pool", tuple(self.pool))
        refuse(
            "Hidden",
            [
                *(one_of("pool", part, get_args(Pooled)) for part in self.pool),
                None if self.pool else "pool is empty, expected some of mean, max, last",
                f"pool names a part twice: {', '.join(self.pool)}"
                if len(set(self.pool)) < len(self.pool)
                else None,
            ],
        )

    def build(self, experts: int, width: int, matrices: Sequence[MixtureLayer]) -> Score:
        """The score as a module, at zero."""
        return HiddenScore(experts, width, self.pool)


@dataclass(frozen=True, kw_only=True)
class Responses(ScoreSpec):
    """Reads what each expert would answer (the MoLE paper, eq. 4-5): `s_e B_e A_e x`.

    Taken for each matrix of the site that reads the site's width, concatenated, L2-normalised.
    """

    def build(self, experts: int, width: int, matrices: Sequence[MixtureLayer]) -> Score:
        """The score as a module, at zero.

        Raises:
            ValueError: No layer with experts reads the site's input.
        """
        if not matrices:
            raise ValueError(
                f"Responses: at one of the sites no expert changes a layer that reads the site's "
                f"input of width {width}, so there is no response to read; use Hidden there"
            )
        if len(matrices[0].ranks) != experts:
            raise ValueError(
                "Responses: what an expert answers is its own, and a slot has many; use Hidden or "
                "Free for gates over slots"
            )
        return _ResponseScore(experts, matrices)


@dataclass(frozen=True, kw_only=True)
class Free(ScoreSpec):
    """Reads nothing: one learned weight vector a site."""

    reads_input = False

    def build(self, experts: int, width: int, matrices: Sequence[MixtureLayer]) -> Score:
        """The score as a module, at zero."""
        return _FreeScore(experts)
