"""The gates of all sites, asked under conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from mole_vl.gates import Gate, GateInput, GateOutput
from mole_vl.layers import MixtureLayer
from mole_vl.passes import Conditions, Masks
from mole_vl.slots import Slots


class GateBank:
    """Each site's gate with the layers that read what it reads.

    Args:
        gates: The gate of each site, by the site's name.
        readers: The layers of each site that read the site's own width.
        slots: What the gates weigh; None for the experts themselves.
    """

    def __init__(
        self,
        gates: Mapping[str, Gate],
        readers: Mapping[str, Sequence[MixtureLayer]],
        slots: Slots | None,
    ) -> None:
        self.gates = gates
        self.readers = readers
        self.slots = slots

    def constant(self, name: str) -> Tensor:
        """The weights (E,) of a gate that reads nothing."""
        return self.gates[name](GateInput(None), self.readers[name]).weights

    def ask(
        self,
        name: str,
        x: Tensor | None,
        told: Conditions,
        masks: Masks,
        features: Tensor | None = None,
    ) -> GateOutput:
        """What the gate of a site says.

        Args:
            name: The site.
            x: Its input; None where nothing is read.
            told: Experts, rows and slots.
            masks: Which positions of the input count.
            features: What the model was told, (rows, width).

        Raises:
            RuntimeError: Gates over slots, and nobody said who fills them.
            ValueError: Something told is for other rows than those of the input.
        """
        gate = self.gates[name]
        # Constant weights take no product; others do it where the input, or the gate, is.
        reads = x is not None or features is not None
        device = (_device(gate) if x is None else x.device).type if reads else "cpu"
        # Scores are fp32: their products must not be taken in an autocast's lower precision.
        with torch.autocast(device, enabled=False):
            output = self._gated(gate, name, x, told, masks, features)
        if self.slots is None:
            return output
        if told.filled is None:
            raise RuntimeError(
                f"the gates weigh the slots {', '.join(self.slots.names)}: say who fills them, by "
                "condition(filled=...), or give the weights, by pinned(...)"
            )
        rows = output.weights.shape[0] if output.weights.dim() > 1 else len(told.filled)
        return self.slots.told(output, spread(told.filled, rows))

    def _gated(
        self,
        gate: Gate,
        name: str,
        x: Tensor | None,
        told: Conditions,
        masks: Masks,
        features: Tensor | None,
    ) -> GateOutput:
        # The model may have moved since it was told: offloading does that at every call.
        device = _device(gate) if x is None else x.device
        kept = None if told.kept is None else told.kept.to(device)
        features = None if features is None else features.to(device)
        pool = real = None
        tenant = None if told.tenant is None else told.tenant.to(device)
        seeds = None if told.seeds is None else told.seeds.to(device)
        if x is not None:
            tenant, seeds = _spread(tenant, x), _spread(seeds, x)
            real = _spread(masks.real, x)
            pool = real if masks.pool is None else _spread(masks.pool, x)
            features = _spread(features, x)
        if told.source is None or (x is None and features is None):
            given = GateInput(x, pool, kept, features, real, tenant, seeds)
            return gate(given, self.readers[name])
        rows, place = torch.unique(told.source.to(device), return_inverse=True)
        x, pool, features, real, tenant, seeds = (
            None if t is None else t[rows] for t in (x, pool, features, real, tenant, seeds)
        )
        given = GateInput(x, pool, kept, features, real, tenant, seeds)
        output = gate(given, self.readers[name])
        experts = None if output.experts is None else output.experts[place]
        return replace(
            output, weights=output.weights[place], experts=experts, logits=output.logits[place]
        )


def _spread(told: Tensor | None, x: Tensor) -> Tensor | None:
    return None if told is None else spread(told.to(x.device), x.shape[0])


def _device(gate: Gate) -> torch.device:
    return next(chain(gate.parameters(), gate.buffers())).device


def spread(told: Tensor, rows: int) -> Tensor:
    """What is told of each row, (n, ...), for `rows` rows: multiplied in place, as beams are."""
    if told.shape[0] == rows:
        return told
    times, rest = divmod(rows, told.shape[0])
    if rest:
        raise ValueError(
            f"conditions, or a preview, are for {told.shape[0]} rows; the model runs {rows}"
        )
    return told.repeat_interleave(times, 0)
