"""A process's part of the global batch, in pieces that it can hold at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from mole_vl.processes import sum_over_processes
from mole_vl.training.rows import rows_of_step
from mole_vl.training.tally import Tally
from mole_vl.training.task import Task


@dataclass(frozen=True)
class Pieces:
    """A process's pieces of one global batch.

    Args:
        batches: The pieces.
        units: Units of each.
        total: Units of the global batch.
        count: Pieces in all processes.
        device: Where their terms will lie.
    """

    batches: Sequence[Any]
    units: Sequence[int]
    total: float
    count: int
    device: torch.device

    def tally(self) -> Tally:
        """A fresh tally of the pieces' terms."""
        return Tally(self.total, self.count, self.device)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return zip(self.batches, self.units, strict=True)


class Share:
    """How the rows of the global batch fall to processes and pieces.

    Args:
        accelerator: Knows the processes.
        rows: Rows of the global batch.
        micro_rows: Rows that a process holds at once; None for its whole part.

    Raises:
        ValueError: The rows do not divide into the processes, or a process's into pieces.
    """

    def __init__(self, accelerator: Accelerator, rows: int, micro_rows: int | None) -> None:
        processes = accelerator.num_processes
        local, rest = divmod(rows, processes)
        if rest:
            raise ValueError(
                f"{rows} rows do not divide into {processes} processes; choose a multiple of "
                f"{processes}"
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "accelerate is told to accumulate gradients over "
                f"{accelerator.gradient_accumulation_steps} steps; set micro_rows instead"
            )
        self.micro_rows = min(micro_rows or local, local)
        if local % self.micro_rows:
            raise ValueError(
                f"a process's {local} rows do not divide into pieces of {self.micro_rows}; "
                "choose micro_rows that divides them"
            )
        self.accelerator, self.rows, self.local = accelerator, rows, local

    def pieces(self, task: Task, seed: int, step: int) -> Pieces:
        """This process's part of a step's global batch.

        Raises:
            ValueError: The global batch has nothing to score.
        """
        start = self.accelerator.process_index * self.local
        mine = rows_of_step(seed, step, self.rows)[start : start + self.local]
        batches = [
            task.batch(mine[first : first + self.micro_rows])
            for first in range(0, self.local, self.micro_rows)
        ]
        units = [task.units(batch) for batch in batches]
        device = self.accelerator.device
        total = float(sum_over_processes(torch.tensor(float(sum(units)), device=device)))
        if total == 0:
            raise ValueError(f"step {step} has nothing to score: its batch has 0 units")
        count = self.accelerator.num_processes * len(batches)
        return Pieces(batches, units, total, count, device)
