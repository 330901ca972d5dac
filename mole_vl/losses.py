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
        shares = weights / weights.sum(-1, keepdim=True)
        real = torch.ones(shares.shape[:-1], device=shares.device)
        if record.real is not None and shares.dim() == 3:
            real = record.real.float()
            # A padded position's share may be anything: it must not meet a product.
            shares = shares.masked_fill(real.unsqueeze(-1) == 0, 0.0)
        sums.append(shares.reshape(-1, shares.shape[-1]).sum(0))
        counts.append(real.sum())
    total = sum_over_processes(torch.stack(sums))
    return total / sum_over_processes(torch.stack(counts)).unsqueeze(-1)


def balance(records: Sequence[Record]) -> Tensor:
    """`L = -log prod_e q_e`, q_e the mean over gates of shares (MoLE, arXiv 2404.13628, eq. 8).

    Least at equal shares, where its gradient is zero.
    """
    return -mean_shares(records).mean(0).log().sum()
