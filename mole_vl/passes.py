"""What one forward of a mixed model was told and found: its pass.

A layer may run again during backward (activation checkpointing), after other forwards, and must
then read what it read first. So nothing is looked up in a "current" slot there: the node that
autograd is at belongs to the forward whose range of sequence numbers holds its own, and that
forward's pass answers. A pass lives as long as the graph of its forward does.
"""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl.fanned import Fanned
from mole_vl.gates import GateOutput

# Key of pinned weights that serve every site.
EVERYWHERE = ""


@dataclass(frozen=True)
class Record:
    """One gate's result in one forward.

    Args:
        site: Name of the site.
        output: What the gate returned.
        real: Positions that are no padding, (rows, positions) bool; None where all are real.
        strength: What multiplied the weights where the layers applied them.
        tenant: The number of each row's tenant, (rows,); None where there are no tenants.
    """

    site: str
    output: GateOutput
    real: Tensor | None
    strength: float | Tensor = 1.0
    tenant: Tensor | None = None


@dataclass(frozen=True)
class Masks:
    """Which positions of a sequence count, (rows, positions) bool each.

    Args:
        real: Positions that are no padding; None where all are.
        pool: Positions that a row's features average over; None for the real ones.
    """

    real: Tensor | None = None
    pool: Tensor | None = None


@dataclass(frozen=True)
class Conditions:
    """What the next forwards are told, snapshot by each pass.

    Args:
        strength: Multiplies the whole mixture; a float or a scalar tensor.
        told: Whether somebody told of the rows: what a forward's own arguments tell is not heard.
        disabled: Whether the base alone speaks.
        kept: Experts not masked out, (E,) bool, or None.
        pinned: Weights that replace the gates', by site or under EVERYWHERE, or None.
        masks: Of the sequence that the model reads.
        streams: Of other sequences, by the path of the part of the model that reads each.
        source: For each row, the row whose gate result it takes, (rows,); None for its own.
        filled: The expert in each row's slots, (rows, S); None where gates weigh experts.
        tenant: The number of each row's tenant, (rows,); None where there are no tenants.
        seeds: What each row's dropout and jitter are drawn from, (rows,) int64; None for torch's
            own generator.
        preview: Whether the model runs up to where the gate of site preview reads, the base alone
            or under the experts' average.
        held: Results of row gates that later forwards take over (a prompt's, while its answer is
            generated), filled by the first forward; None for gates computed anew.
        records: Where results are listed, or None.
    """

    strength: float | Tensor = 1.0
    told: bool = False
    disabled: bool = False
    kept: Tensor | None = None
    pinned: Mapping[str, Tensor] | None = None
    masks: Masks = Masks()
    streams: Mapping[str, Masks] = field(default_factory=dict)
    source: Tensor | None = None
    filled: Tensor | None = None
    tenant: Tensor | None = None
    seeds: Tensor | None = None
    preview: bool = False
    held: dict[str, GateOutput] | None = None
    records: list[Record] | None = None

    def masks_at(self, path: str | None) -> Masks:
        """Those of the sequence that the module at `path` reads; the nearest part decides."""
        parts = [p for p in self.streams if path == p or (path or "").startswith(f"{p}.")]
        return self.streams[max(parts, key=len)] if parts else self.masks


@dataclass(eq=False)
class Pass:
    """One forward: its conditions, the results it takes over, its gates' results.

    `opener` is the module whose call it is: the model, or a part of it that is called by itself.

    `held` is what earlier forwards left when this one began: a part of it that runs again during
    backward computes anew what it computed the first time. `features`, (rows, width), are what the
    model was told in this forward, where its gates are conditioned on it. `fanned` is what the
    feed-forwards in progress read, by site. What runs again has its own, `replayed` and `refanned`.
    """

    conditions: Conditions
    held: Mapping[str, GateOutput]
    first: int
    grad: bool
    opener: nn.Module
    last: int | None = None
    features: Tensor | None = None
    results: dict[str, GateOutput] = field(default_factory=dict)
    replayed: dict[str, GateOutput] = field(default_factory=dict)
    fanned: dict[str, Fanned] = field(default_factory=dict)
    refanned: dict[str, Fanned] = field(default_factory=dict)


def replaying() -> bool:
    """Whether code runs inside a backward: a checkpointed part is running again."""
    return torch._C._current_graph_task_id() != -1


def _sequence_number() -> int:
    """The number that the next node of this thread's graph gets."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]


class Passes:
    """The passes of one mixture: the one in progress and those whose graphs are alive."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        self._alive: list[weakref.ref[Pass]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Passes":
        return Passes()

    def __reduce__(self) -> tuple[type["Passes"], tuple[()]]:
        return Passes, ()

    def open(self, conditions: Conditions, opener: nn.Module) -> Pass:
        """Begin a forward of a module."""
        grad = torch.is_grad_enabled()
        held = dict(conditions.held or {})
        self.current = Pass(conditions, held, _sequence_number(), grad, opener)
        return self.current

    def close(self, output: Any) -> None:
        """End the forward in progress; `output` keeps its pass alive."""
        ended, self.current = self.current, None
        if ended is None:
            return
        ended.last = _sequence_number()
        nodes = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
        if nodes:
            self._alive = [ref for ref in self._alive if ref() is not None]
            self._alive.append(weakref.ref(ended))
            for node in nodes:
                metadata: dict[str, Any] = node.metadata  # pyright: ignore[reportAssignmentType]
                metadata.setdefault("mole_vl", []).append(ended)

    def of_backward(self) -> Pass:
        """The pass of the forward whose graph the running backward is in."""
        node = torch._C._current_autograd_node()
        number = node._sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        alive = [found for ref in self._alive if (found := ref()) is not None]
        fitting = [p for p in alive if p.last is not None and p.first <= number < p.last]
        if len(fitting) > 1:
            # Threads count on their own, so that two threads' graphs may bear the same numbers.
            raise RuntimeError(
                "forwards of several threads await their backward, and a checkpointed layer cannot "
                "tell to which it belongs; run each thread's backward before the next forward"
            )
        if fitting:
            return fitting[0]
        raise RuntimeError(
            "a mixed layer runs inside a backward, but not as a part of a forward of its model; "
            "call the model itself where activations are checkpointed, not its blocks"
        )


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output: a tensor, a sequence, a mapping, or a dataclass."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output):
        for field_ in fields(output):
            yield from _tensors(getattr(output, field_.name))
