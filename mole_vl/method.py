"""Mixtures whose experts are made with them and learn with their gates."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mole_vl.build import check_unmixed, mix
from mole_vl.calls import Calls
from mole_vl.experts import Expert
from mole_vl.gates import GateSpec
from mole_vl.layers import layer_shapes
from mole_vl.mixture import Mixture
from mole_vl.passes import Record
from mole_vl.sites import SiteKind
from mole_vl.stack import Learning
from mole_vl.targets import check_targets, target_layers


@dataclass(frozen=True)
class Plan:
    """What a method puts into a model.

    Args:
        experts: New ones, which change nothing yet.
        gate: What decides the weights.
        site: Which layers share one gate; None where any will do.
        learning: How the experts learn.
    """

    experts: Sequence[Expert]
    gate: GateSpec
    site: SiteKind | None
    learning: Learning


class Method(ABC):
    """A kind of mixture that is trained from nothing: its experts, its gates, its losses."""

    @abstractmethod
    def plan(self, model: nn.Module, blocks: Mapping[str, int]) -> Plan:
        """What it puts into a model, which stays as it is.

        Args:
            model: The base.
            blocks: As for `mole_vl.mix`.

        Raises:
            ValueError: Settings that do not fit the model.
        """

    def mix(
        self, model: nn.Module, *, blocks: Mapping[str, int], calls: Calls | None = None
    ) -> Mixture:
        """Put new experts and gates into a model, in place; untrained, they change nothing.

        Args:
            model: The base, which is frozen.
            blocks: As for `mole_vl.mix`.
            calls: As for `mole_vl.mix`.

        Raises:
            ValueError: Settings that do not fit the model.
            RuntimeError: The model is mixed already.
        """
        check_unmixed(model)
        plan = self.plan(model, blocks)
        return mix(
            model,
            plan.experts,
            gate=plan.gate,
            site=plan.site or "network",
            blocks=blocks,
            calls=calls,
            learning=plan.learning,
        )

    @abstractmethod
    def losses(
        self, records: Sequence[Record], blocks: Collection[str]
    ) -> Mapping[str, tuple[Tensor, float]]:
        """What is added to the loss of one forward: each term's value and factor, by its name.

        Args:
            records: What its mixture's `record()` listed.
            blocks: Paths of the model's blocks.
        """


def targeted(
    model: nn.Module, name: str, targets: Sequence[str] | None, blocks: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Shape of each linear layer that gets factors, by path.

    Args:
        model: The model.
        name: The method's, for the message.
        targets: Ends of the layers' paths, such as `q_proj`; None for every linear layer in a
            block.
        blocks: Paths of the model's blocks.

    Raises:
        ValueError: A target that names no linear layer; no block.
    """
    shapes = {path: shape for path, shape in layer_shapes(model).items() if len(shape) == 2}
    if targets is None:
        found = {p: s for p, s in shapes.items() if any(p.startswith(f"{b}.") for b in blocks)}
        if not found:
            raise ValueError(f"{name}: no linear layer lies in a block; name the targets")
        return found
    check_targets(model, name, targets)
    return {path: shapes[path] for path in target_layers(model, targets) if path in shapes}
