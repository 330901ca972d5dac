"""A step's terms, summed over pieces and processes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_vl.processes import sum_over_processes
from mole_vl.training.task import Term


@dataclass(frozen=True)
class Values:
    """A step's values over the global batch.

    Args:
        terms: The loss's terms.
        measures: What is measured beside it.
        loss: The weighted sum of the terms.
    """

    terms: Mapping[str, float]
    measures: Mapping[str, float]
    loss: float


class Tally:
    """Sums terms as their pieces come.

    Args:
        units: Of the global batch.
        pieces: How many there are in all processes.
        device: Where the terms lie.
    """

    def __init__(self, units: float, pieces: int, device: torch.device) -> None:
        self._units = units
        self._pieces = pieces
        self._zero = torch.zeros((), device=device)
        self._seen: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, terms: Mapping[str, Term], units: int) -> Tensor:
        """One piece's part in the loss of the global batch.

        Args:
            terms: The piece's terms.
            units: Its units.
        """
        loss = self._zero
        for name, term in terms.items():
            self._weights[name] = term.weight
            if term.per_unit and units == 0:
                # A mean over nothing is no number, and counts nothing.
                self._seen.setdefault(name, self._zero)
                continue
            part = units / self._units if term.per_unit else 1 / self._pieces
            value = term.value.float() * part
            if term.weight:
                loss = loss + term.weight * value
            self._seen[name] = self._seen.get(name, self._zero) + value.detach()
        return loss

    def values(self) -> Values:
        """The sums over all processes."""
        names = sorted(self._seen)
        sums = sum_over_processes(torch.stack([self._seen[name] for name in names])).tolist()
        found = dict(zip(names, sums, strict=True))
        weights = self._weights
        return Values(
            {name: value for name, value in found.items() if weights[name] != 0},
            {name: value for name, value in found.items() if weights[name] == 0},
            sum(weights[name] * value for name, value in found.items() if weights[name] != 0),
        )
