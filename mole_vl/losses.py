"""Losses on gate results: pure functions of what `record()` lists."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_vl.passes import Record
from mole_vl.processes import sum_over_processes


def mean_shares(records: Sequence[Record]) -> Tensor:
    """Each gate's mean shares over real rows and positions of all processes, (gates, E).

    A share is `p_e = w_e / sum w`; a padded position counts nothing.

    Raises:
        ValueError: No gate spoke.
    """
    if not records:
        raise ValueError("no gate result was recorded: run the model inside record()")
    sums, counts = [], []
    for record in records:
        weights = record.output.weights.float()
        shares, real = real_positions(record, weights / weights.sum(-1, keepdim=True))
        sums.append(shares.reshape(-1, shares.shape[-1]).sum(0))
        counts.append(real.sum())
    total = sum_over_processes(torch.stack(sums))
    return total / sum_over_processes(torch.stack(counts)).unsqueeze(-1)


def real_positions(record: Record, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values of a record's gate (..., E) with padding at zero, and what counts, (...), 1 or 0."""
    values = values.float()
    if record.real is None or values.dim() < 3:
        return values, torch.ones(values.shape[:-1], device=values.device)
    # A padded position's value may be anything: it must not meet a product.
    return values.masked_fill(~record.real.unsqueeze(-1), 0.0), record.real.float()


def balance(records: Sequence[Record]) -> Tensor:
    """`L = -log prod_e q_e`, q_e the mean over gates of shares (MoLE, arXiv 2404.13628, eq. 8).

    Least at equal shares, where its gradient is zero.
    """
    return -mean_shares(records).mean(0).log().sum()
