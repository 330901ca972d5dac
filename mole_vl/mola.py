"""MoLA: a router for each projection, more experts where a layer needs more (arXiv 2402.08562)."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from mole_vl.faults import at_least, one_of, positive, refuse, share
from mole_vl.fresh import Form, fresh_expert
from mole_vl.gates import BySite, GateSpec, Router, TopK
from mole_vl.losses import load_balance
from mole_vl.method import Method, Plan, targeted
from mole_vl.passes import Record
from mole_vl.sites import block_of
from mole_vl.stack import Learning

Balanced = Literal["layer", "router"]
Shape = Literal["rectangle", "triangle", "inverted_triangle", "hourglass"]
_SLOPES = {
    "rectangle": (1.0, 1.0, 1.0, 1.0),
    "triangle": (1.6, 1.2, 0.8, 0.4),
    "inverted_triangle": (0.4, 0.8, 1.2, 1.6),
    "hourglass": (1.6, 0.4, 0.4, 1.6),
}


def experts_by_layer(shape: Shape, layers: int, mean: int = 5) -> tuple[int, ...]:
    """How many experts each layer has: the paper's four shapes, at any depth.

    With 5 in the mean: rectangle 5 5 5 5, triangle 8 6 4 2, inverted_triangle 2 4 6 8 and hourglass
    8 2 2 8, each number for a quarter of the layers, from the first.

    Args:
        shape: Its name.
        layers: How many layers there are.
        mean: How many experts a layer has in the mean.

    Raises:
        ValueError: An unknown shape, or a number below 1.
    """
    refuse(
        "experts_by_layer",
        [
            one_of("shape", shape, get_args(Shape)),
            at_least("layers", layers, 1),
            at_least("mean", mean, 1),
        ],
    )
    slope = _SLOPES[shape]
    return tuple(max(1, round(mean * slope[4 * layer // layers])) for layer in range(layers))


@dataclass(frozen=True, kw_only=True)
class MoLA(Method):
    """Each projection has its router and experts; how many there are differs by layer.

    Args:
        experts: How many experts a layer's projections have: a number for each layer, one for all,
            or the name of a shape.
        mean: With the name of a shape, experts of a layer in the mean.
        top_k: How many of them a position goes to, likewise by layer or one for all.
        rank: Of each factor pair, likewise.
        alpha: The product B A counts alpha / rank times.
        targets: Ends of the names of the layers that get factors; None for all linear layers of
            the blocks.
        dropout: Share of a factor pair's inputs that a training step leaves out.
        balance: Factor of the balance loss; 0 for none, as in the paper. Its authors' is 0.001.
        balanced: Whose positions that loss counts together: all of a layer's routers (layer), as
            its authors do, which leaves uneven ones to make up for each other; or each router's own
            (router).
        seed: Of the start of experts and routers.
    """

    experts: tuple[int, ...] | int | Shape = "inverted_triangle"
    mean: int = 5
    top_k: tuple[int, ...] | int = 2
    rank: tuple[int, ...] | int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.05
    balance: float = 0.0
    balanced: Balanced = "layer"
    seed: int = 0

    def __post_init__(self) -> None:
        lists = {"experts": self.experts, "top_k": self.top_k, "rank": self.rank}
        refuse(
            "MoLA",
            [
                one_of("experts", self.experts, get_args(Shape))
                if isinstance(self.experts, str)
                else None,
                *(
                    at_least(name, one, 1)
                    for name, value in lists.items()
                    if not isinstance(value, str)
                    for one in (value if isinstance(value, tuple) else (value,))
                ),
                at_least("mean", self.mean, 1),
                positive("alpha", self.alpha),
                "targets is empty, expected names of layers" if self.targets == () else None,
                share("dropout", self.dropout),
                at_least("balance", self.balance, 0),
                one_of("balanced", self.balanced, get_args(Balanced)),
                at_least("seed", self.seed, 0),
            ],
        )

    def plan(self, model: nn.Module, blocks: Mapping[str, int]) -> Plan:
        """As of `Method`: experts are called expert0, expert1 ..., each on the layers that have it.

        A layer is a block that carries targets, in the model's order.
        """
        shapes = targeted(model, "MoLA", self.targets, blocks)
        owner = {path: block_of(path, blocks) or "" for path in shapes}
        outside = [path for path, block in owner.items() if not block]
        refuse("MoLA", [f"the target {outside[0]} lies in no block" if outside else None])
        layers = [block for block in blocks if block in owner.values()]
        experts, top_k, rank = (dict(zip(layers, n, strict=True)) for n in self._lists(len(layers)))
        forms = {path: Form(rank=rank[block], alpha=self.alpha) for path, block in owner.items()}
        made = [
            fresh_expert(
                f"expert{place}",
                model,
                {path: form for path, form in forms.items() if experts[owner[path]] > place},
                seed=self.seed,
            )
            for place in range(max(experts.values()))
        ]
        return Plan(made, self._gate(top_k), "matrix", Learning(dropout=self.dropout))

    def _lists(self, layers: int) -> tuple[tuple[int, ...], ...]:
        """Experts, top_k and rank of each layer."""
        given = self.experts
        if isinstance(given, str):
            given = experts_by_layer(given, layers, self.mean)
        lists = {"experts": given, "top_k": self.top_k, "rank": self.rank}
        refuse(
            "MoLA",
            [
                f"{name} has {len(one)} numbers, and the model {layers} layers with targets"
                for name, one in lists.items()
                if isinstance(one, tuple) and len(one) != layers
            ],
        )
        return tuple(one if isinstance(one, tuple) else (one,) * layers for one in lists.values())

    def _gate(self, top_k: Mapping[str, int]) -> GateSpec:
        by_layer = {
            layer: Router(choice=TopK(k=k), start="uniform", seed=self.seed)
            for layer, k in top_k.items()
        }
        default = next(iter(by_layer.values()))
        others = {layer: one for layer, one in by_layer.items() if one != default}
        return BySite(default=default, sites=others) if others else default

    def losses(
        self, records: Sequence[Record], blocks: Collection[str]
    ) -> Mapping[str, tuple[Tensor, float]]:
        """`balance`, summed over layers or over routers, where its factor is not 0."""
        if not self.balance:
            return {}

        def together(site: str) -> Hashable:
            return site if self.balanced == "router" else block_of(site, blocks)

        found = load_balance(records, together=together, by_choice=True)
        return {"balance": (found, self.balance)}
