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

    def number(self, stream: int = 0) -> int:
        """A seed of 63 bits for (seed, step, row); `stream` separates unrelated uses."""
        return mix_seed(self.seed, self.step, self.index, stream)

    def generator(self, stream: int = 0) -> torch.Generator:
        """A fresh CPU generator of `number`."""
        generator = torch.Generator()
        generator.manual_seed(self.number(stream))
        return generator

    def pick(self, n: int) -> int:
        """An example out of `n`: epoch by epoch, each in a fresh order, none twice an epoch."""
        epoch, place = divmod(self.position, n)
        return int(_order(self.seed, epoch, n)[place])


class Alike:
    """Picks examples as `Row.pick` does, epoch by epoch, but those of like size for one batch.

    An epoch's order is cut into pools of `POOL` global batches, each pool is sorted by size, and
    then the batches are shuffled. The batch in which an epoch ends has examples of any size.

    Args:
        sizes: Of each example.
    """

    POOL = 50

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = np.asarray(sizes)
        self._kept: dict[tuple[int, int, int], np.ndarray] = {}

    def pick(self, row: Row) -> int:
        """The place of a row's example."""
        epoch, place = divmod(row.position, len(self._sizes))
        key = (row.seed, epoch, row.rows)
        if key not in self._kept:
            # A batch may reach from one epoch into the next, and no further back.
            self._kept = {k: order for k, order in self._kept.items() if k[1] == epoch - 1}
            self._kept[key] = self._order(*key)
        return int(self._kept[key][place])

    def _order(self, seed: int, epoch: int, rows: int) -> np.ndarray:
        n = len(self._sizes)
        order = _order(seed, epoch, n)
        # Batches begin at multiples of `rows`, which an epoch need not.
        begun = min(-epoch * n % rows, n)
        whole = (n - begun) // rows * rows
        body = order[begun : begun + whole]
        batches = []
        for start in range(0, whole, self.POOL * rows):
            pool = body[start : start + self.POOL * rows]
            batches.append(pool[self._sizes[pool].argsort(kind="stable")].reshape(-1, rows))
        shuffled = np.random.default_rng([seed, epoch, n, rows]).permutation(
            np.concatenate(batches) if batches else body.reshape(0, rows)
        )
        return np.concatenate([order[:begun], shuffled.flatten(), order[begun + whole :]])


def rows_of_step(seed: int, step: int, rows: int) -> Sequence[Row]:
    """All rows of one step's global batch."""
    return [Row(seed, step, index, rows) for index in range(rows)]
