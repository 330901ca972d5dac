"""MoLE: learned gates (Mixture of LoRA Experts, arXiv 2404.13628)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from mole_vl.faults import at_least, instance_of, one_of, refuse
from mole_vl.gates.conditioning import Conditioning
from mole_vl.gates.gate import Gate, GateInput, GateSpec, Previewed
from mole_vl.gates.normalisers import Normaliser, NormaliserSpec, Softmax
from mole_vl.gates.output import GateOutput
from mole_vl.gates.scores import Free, Hidden, Score, ScoreSpec
from mole_vl.gates.topk import highest
from mole_vl.layers import MixtureLayer
from mole_vl.sites import Site

Over = Literal["row", "position"]


class LearnedGate(Gate):
    """A score and a normaliser, over rows or positions; with conditioning, on features too."""

    def __init__(
        self,
        score: Score,
        normaliser: Normaliser,
        over: Over,
        conditioning: Conditioning | None = None,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        self.score = score
        self.conditioning = conditioning
        self.normaliser = normaliser
        self.over = over
        self.top_k = top_k

    def forward(self, given: GateInput, matrices: Sequence[MixtureLayer]) -> GateOutput:
        """Weights (E,), (rows, E) or (rows, positions, E)."""
        x = given.x
        if x is not None and self.over == "row":
            x = self.score.pooled(x, given.pool)
        logits = self.logits(x, given.features, matrices)
        chosen = None if self.top_k is None else self._chosen(logits, given.kept, self.top_k)
        return GateOutput(self.normaliser(logits, given.kept, chosen), None, logits)

    def logits(
        self, x: Tensor | None, features: Tensor | None, matrices: Sequence[MixtureLayer]
    ) -> Tensor:
        """Scores (lead, E) before they are normalised.

        Args:
            x: The site's input, pooled for a gate over rows; None where nothing is read.
            features: What the model itself was told of each row, (rows, features), or None.
            matrices: The site's layers that read the site's width.
        """
        logits = self.score(x, matrices)
        return logits if self.conditioning is None else self.conditioning(logits, features)

    @staticmethod
    def _chosen(logits: Tensor, kept: Tensor | None, k: int) -> Tensor:
        """The k highest scores; a masked expert takes no place among them."""
        if kept is None:
            return highest(logits, k)
        return highest(logits.masked_fill(~kept, -math.inf), k) & kept

    def extra_repr(self) -> str:
        """What `print` says of the gate."""
        return f"over={self.over}" + ("" if self.top_k is None else f", top_k={self.top_k}")


@dataclass(frozen=True, kw_only=True)
class MoLE(GateSpec):
    """A learned score, normalised: one gate a site.

    Args:
        score: What the gate reads: Hidden, Responses, or Free.
        normaliser: Softmax, ScaledSoftmax or Sigmoid.
        over: Whether weights vary by row (a picture, a prompt) or by position (a token).
        top_k: How many experts get weights: those of the highest scores. None for all. A gate that
            reads nothing, before one that does, gives weights to all.
        preview: What site preview shows the gate: the base alone, or the base under the experts'
            average, whose states tell what the experts know of the row (X-LoRA's first pass under
            a `scaling_pass_value`).
    """

    score: ScoreSpec = Hidden()
    normaliser: NormaliserSpec = Softmax()
    over: Over = "row"
    top_k: int | None = None
    preview: Previewed = "base"

    def __post_init__(self) -> None:
        refuse(
            "MoLE",
            [
                instance_of("score", self.score, ScoreSpec),
                instance_of("normaliser", self.normaliser, NormaliserSpec),
                one_of("over", self.over, get_args(Over)),
                at_least("top_k", self.top_k, 1),
                one_of("preview", self.preview, get_args(Previewed)),
                "score.pool is for over='row': a position reads itself"
                if self.score != Hidden()
                and isinstance(self.score, Hidden)
                and self.over == "position"
                else None,
            ],
        )

    @property
    def reads_input(self) -> bool:
        """Whether the gate looks at the site's input."""
        return self.score.reads_input

    def blind(self) -> GateSpec:
        """One learned weight vector, normalised alike."""
        return replace(self, score=Free(), preview="base", top_k=None)

    @property
    def takes_features(self) -> bool:
        """Whether the gate can be conditioned: yes, whatever its score reads."""
        return True

    def build(self, experts: Sequence[str], site: Site, matrices: Sequence[MixtureLayer]) -> Gate:
        """The gate of one site as a module."""
        score = self.score.build(len(experts), site.width, matrices)
        conditioning = Conditioning(len(experts), site.features) if site.features else None
        normaliser = self.normaliser.build(len(experts))
        return LearnedGate(score, normaliser, self.over, conditioning, self.top_k)
