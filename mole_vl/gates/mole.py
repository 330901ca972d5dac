"""MoLE: learned gates (Mixture of LoRA Experts, arXiv 2404.13628)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from mole_vl.faults import instance_of, one_of, refuse
from mole_vl.gates.conditioning import Conditioning
from mole_vl.gates.gate import Gate, GateInput, GateSpec
from mole_vl.gates.normalisers import Normaliser, NormaliserSpec, Softmax
from mole_vl.gates.output import GateOutput
from mole_vl.gates.scores import Free, Hidden, Score, ScoreSpec
from mole_vl.layers import MixtureLayer
from mole_vl.sites import Site

Over = Literal["row", "position"]


def pooled_mean(x: Tensor, pool: Tensor | None) -> Tensor:
    """Mean of a row's pooled positions, each of length 1: (rows, positions, d) to (rows, d).

    Without the normalisation a few positions of giant norm, such as the attention sinks of
    language models, drown all others, and rows hardly differ.

    Raises:
        ValueError: The mask has other positions than the input, or a row pools none.
    """
    if x.dim() == 2:
        return x
    if x.dim() != 3:
        raise ValueError(
            f"a gate reads (rows, positions, width) or (rows, width), got {tuple(x.shape)}"
        )
    if pool is None:
        return F.normalize(x.float(), dim=-1).mean(1)
    if pool.shape != x.shape[:2]:
        raise ValueError(
            f"the pooled positions are given as {tuple(pool.shape)}, but the site reads "
            f"{tuple(x.shape[:2])} rows and positions"
        )
    # A padded position may hold anything, infinities too: it must not meet a product, nor a norm.
    real = F.normalize(x.float().masked_fill(~pool.unsqueeze(-1), 0.0), dim=-1)
    count = pool.sum(1, keepdim=True)
    if not (count > 0).all():
        raise ValueError("a row pools no position: it has no real input to gate on")
    return real.sum(1) / count


class LearnedGate(Gate):
    """A score and a normaliser, over rows or positions; with conditioning, on features too."""

    def __init__(
        self,
        score: Score,
        normaliser: Normaliser,
        over: Over,
        conditioning: Conditioning | None = None,
    ) -> None:
        super().__init__()
        self.score = score
        self.conditioning = conditioning
        self.normaliser = normaliser
        self.over = over

    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """Weights (E,), (rows, E) or (rows, positions, E)."""
        x = given.x
        if x is not None and self.over == "row":
            x = pooled_mean(x, given.pool)
        logits = self.score(x, matrices)
        if self.conditioning is not None:
            logits = self.conditioning(logits, given.features)
        return GateOutput(self.normaliser(logits, given.kept), None, logits)

    def extra_repr(self) -> str:
        """What `print` says of the gate."""
        return f"over={self.over}"


@dataclass(frozen=True, kw_only=True)
class MoLE(GateSpec):
    """A learned score, normalised: one gate a site.

    Args:
        score: What the gate reads: Hidden, Responses, or Free.
        normaliser: Softmax, ScaledSoftmax or Sigmoid.
        over: Whether weights vary by row (a picture, a prompt) or by position (a token).
    """

    score: ScoreSpec = Hidden()
    normaliser: NormaliserSpec = Softmax()
    over: Over = "row"

    def __post_init__(self) -> None:
        refuse(
            "MoLE",
            [
                instance_of("score", self.score, ScoreSpec),
                instance_of("normaliser", self.normaliser, NormaliserSpec),
                one_of("over", self.over, get_args(Over)),
            ],
        )

    @property
    def reads_input(self) -> bool:
        """Whether the gate looks at the site's input."""
        return self.score.reads_input

    def blind(self) -> GateSpec:
        """One learned weight vector, normalised alike."""
        return replace(self, score=Free())

    @property
    def takes_features(self) -> bool:
        """Whether the gate can be conditioned: yes, whatever its score reads."""
        return True

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
        score = self.score.build(len(experts), site.width, matrices)
        conditioning = Conditioning(len(experts), site.features) if site.features else None
        return LearnedGate(score, self.normaliser.build(len(experts)), self.over, conditioning)
