"""MixLoRA: experts on the feed-forward, one LoRA on attention (arXiv 2404.15159)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from mole_vl.faults import at_least, instance_of, one_of, positive, refuse, share
from mole_vl.feedforward import feed_forwards
from mole_vl.fresh import Form, fresh_expert
from mole_vl.gates import Choice, Router, TopK
from mole_vl.losses import everywhere, load_balance, z_loss
from mole_vl.method import Method, Plan, targeted
from mole_vl.passes import Record
from mole_vl.stack import Learning

Balanced = Literal["model", "layer"]
SHARED = "shared"
"""The one expert of all that is no feed-forward."""


@dataclass(frozen=True, kw_only=True)
class MixLoRA(Method):
    """Each position runs the feed-forward once for each of its experts, nonlinearity inside.

    Targets inside a feed-forward get one factor pair for each expert, the others one in all.

    Args:
        experts: How many a feed-forward has.
        choice: Which of them a position goes to: TopK, TopP or Switch.
        targets: Ends of the names of the layers that get factors; None for all linear layers of
            the blocks.
        form: Of each expert.
        shared: Form of the LoRA outside of the feed-forwards; the experts' own if not given.
        dropout: Share of a factor pair's inputs that a training step leaves out.
        jitter: In training, a router's input is multiplied by U(1 - jitter, 1 + jitter).
        spread: Standard deviation of the routers' start.
        balance: Factor of the load-balance loss; 0 for none.
        balanced: Whose positions that loss counts together: all layers' (model), as MoE-PEFT does,
            so that a layer may load its experts unevenly where others make up for it; or each
            layer's by themselves, summed (layer), as in the Switch Transformer.
        z: Factor of the z-loss; 0 for none.
        seed: Of the start of experts and routers.
    """

    experts: int = 8
    choice: Choice = TopK()
    targets: tuple[str, ...] | None = None
    form: Form = Form()
    shared: Form | None = None
    dropout: float = 0.05
    jitter: float = 0.0
    spread: float = 0.02
    balance: float = 0.001
    balanced: Balanced = "model"
    z: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(
            "MixLoRA",
            [
                at_least("experts", self.experts, 1),
                instance_of("choice", self.choice, Choice),
                "targets is empty, expected names of layers" if self.targets == () else None,
                share("dropout", self.dropout),
                share("jitter", self.jitter),
                positive("spread", self.spread),
                at_least("balance", self.balance, 0),
                one_of("balanced", self.balanced, get_args(Balanced)),
                at_least("z", self.z, 0),
                at_least("seed", self.seed, 0),
            ],
        )

    @property
    def gate(self) -> Router:
        """The routers' specification."""
        return Router(choice=self.choice, jitter=self.jitter, spread=self.spread, seed=self.seed)

    def plan(self, model: nn.Module, blocks: Mapping[str, int]) -> Plan:
        """As of `Method`: the experts are called expert0, expert1 ... and shared."""
        shapes = targeted(model, "MixLoRA", self.targets, blocks)
        inside = feed_forwards(model, shapes, blocks)
        if not inside:
            raise ValueError(
                "MixLoRA: none of the targets lies in a feed-forward that is a module of its own: "
                "name some, or take MoLA, whose experts are on single layers"
            )
        own, rest = set(inside), shapes.keys() - inside.keys()
        parts = [(f"expert{place}", own, self.form) for place in range(self.experts)]
        if rest:
            parts.append((SHARED, rest, self.shared or self.form))
        experts = [
            fresh_expert(name, model, {p: form for p in shapes if p in own}, seed=self.seed)
            for name, own, form in parts
        ]
        return Plan(experts, self.gate, "feedforward", Learning(dropout=self.dropout))

    def losses(
        self, records: Sequence[Record], blocks: Collection[str]
    ) -> Mapping[str, tuple[Tensor, float]]:
        """`balance`, over all layers at once or by layer, and `z`, where a factor is not 0."""
        found = {}
        if self.balance:
            together = str if self.balanced == "layer" else everywhere
            found["balance"] = load_balance(records, together=together), self.balance
        if self.z:
            found["z"] = z_loss(records), self.z
        return found
