"""Rows of a global batch, and the randomness that belongs to each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, well mixed (numpy's SeedSequence)."""
    state = np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(2)
    return int(state[0]) << 31 ^ int(state[1])


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, n]).permutation(n)


@dataclass(frozen=True)
class Row:
    """One row of step `step`'s global batch of `rows` rows.

    Everything random about it (which example, noise, time step, crop) comes from the row itself,
    never from the process that happens to hold it: one process or two, resumed or not, a row is
    the same row.
    """

    seed: int
    step: int
    index: int
    rows: int

    @property
    def position(self) -> int:
        """How many rows came before this one in the whole run."""
        return self.step * self.rows + self.index

    def generator(self, stream: int = 0) -> torch.Generator:
        """A fresh CPU generator for (seed, step, row); `stream` separates unrelated uses."""
        generator = torch.Generator()
        generator.manual_seed(mix_seed(self.seed, self.step, self.index, stream))
        return generator

    def pick(self, n: int) -> int:
        """An example out of `n`: epoch by epoch, each in a fresh order, none twice an epoch."""
        epoch, place = divmod(self.position, n)
        return int(_order(self.seed, epoch, n)[place])


def rows_of_step(seed: int, step: int, rows: int) -> Sequence[Row]:
    """All rows of one step's global batch."""
    return [Row(seed, step, index, rows) for index in range(rows)]
