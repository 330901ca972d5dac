"""One LoRA alone, as the simplest of the mixtures that are trained from nothing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mole_vl.faults import at_least, refuse, share
from mole_vl.fresh import Form, fresh_expert
from mole_vl.gates import Sum
from mole_vl.method import Method, Plan, targeted
from mole_vl.passes import Record
from mole_vl.stack import Learning

NAME = "lora"


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """One expert, which every position goes to (arXiv 2106.09685).

    Args:
        form: Of its factors.
        targets: Ends of the names of the layers that get factors; None for all linear layers of
            the blocks.
        dropout: Share of a factor pair's inputs that a training step leaves out.
        seed: Of its start.
    """

    form: Form = Form()
    targets: tuple[str, ...] | None = None
    dropout: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(
            "LoRA",
            [
                "targets is empty, expected names of layers" if self.targets == () else None,
                share("dropout", self.dropout),
                at_least("seed", self.seed, 0),
            ],
        )

    def plan(self, model: nn.Module, blocks: Mapping[str, int]) -> Plan:
        """As of `Method`: the expert is called lora."""
        paths = targeted(model, "LoRA", self.targets, blocks)
        expert = fresh_expert(NAME, model, dict.fromkeys(paths, self.form), seed=self.seed)
        return Plan([expert], Sum(), None, Learning(dropout=self.dropout))

    def losses(
        self, records: Sequence[Record], blocks: Collection[str]
    ) -> Mapping[str, tuple[Tensor, float]]:
        """None."""
        return {}
