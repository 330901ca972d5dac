"""Losses on gate results: pure functions of what `record()` lists."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_vl.gates import NOBODY, GateOutput
from mole_vl.passes import Record
from mole_vl.plans import in_order
from mole_vl.processes import sum_over_processes

Added: TypeAlias = Callable[[Sequence[Record]], Mapping[str, tuple[Tensor, float]]]
"""What a mixture adds to the loss of a forward whose gates said this: by name, value and factor."""


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
        weights = weights_of_all(record).float()
        shares, real = real_positions(record, weights / weights.sum(-1, keepdim=True))
        sums.append(shares.reshape(-1, shares.shape[-1]).sum(0))
        counts.append(real.sum())
    total = sum_over_processes(torch.stack(sums))
    return total / sum_over_processes(torch.stack(counts)).unsqueeze(-1)


def weights_of_all(record: Record) -> Tensor:
    """A record's weights of all experts in order, (..., E), 0 for those not chosen; or of slots."""
    output = record.output
    if output.slots:
        return output.weights
    return in_order(output.weights, output.experts, output.logits.shape[-1])


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


def everywhere(_site: str) -> Hashable:
    """One group of all sites."""
    return None


def load_balance(
    records: Sequence[Record],
    *,
    together: Callable[[str], Hashable] = everywhere,
    by_choice: bool = False,
) -> Tensor:
    """`E sum_e f_e P_e`, which is least where routers give all their experts as much to do.

    `f_e` is how often a position goes to expert e, `P_e` the mean of e's share before the choice,
    both over real positions of all processes. Through `P` alone goes a gradient. Of top-k routers
    that are even it is k (Switch Transformer, arXiv 2101.03961, eq. 4, as MixLoRA has it).

    Args:
        records: What `record()` lists. Gates that choose nobody are left out.
        together: Whose positions are counted together, by the site's name; the sum over these
            groups is returned. All by default, as in MixLoRA; a block's routers in MoLA.
        by_choice: Whether `f` sums to 1 and not to k, as in MoLA (arXiv 2402.08562).

    Raises:
        ValueError: No router spoke.
    """
    groups: dict[Hashable, list[Record]] = {}
    for record in _of_routers(records):
        groups.setdefault(together(record.site), []).append(record)
    return torch.stack([_group_balance(own, by_choice) for own in groups.values()]).sum()


def _group_balance(records: Sequence[Record], by_choice: bool) -> Tensor:
    chosen = shares = count = torch.zeros(())
    for record in records:
        picks, real = real_positions(record, picked(record.output))
        probable, _ = real_positions(record, record.output.logits.softmax(-1))
        chosen = chosen + picks.reshape(-1, picks.shape[-1]).sum(0)
        shares = shares + probable.reshape(-1, picks.shape[-1]).sum(0)
        count = count + real.sum()
    # The counts are whole numbers, and carry no gradient.
    chosen, shares, count = (sum_over_processes(one) for one in (chosen, shares, count))
    here = records[0].output.logits.isfinite().reshape(-1, len(chosen)).any(0).sum()
    often = chosen / (chosen.sum() if by_choice else count)
    return here * (often * shares / count).sum()


def z_loss(records: Sequence[Record]) -> Tensor:
    """Mean of `logsumexp(logits)^2` over real positions and routers (ST-MoE, arXiv 2202.08906).

    It keeps the routers' scores small.

    Raises:
        ValueError: No router spoke.
    """
    total = count = torch.zeros(())
    for record in _of_routers(records):
        size, real = real_positions(record, record.output.logits.logsumexp(-1, keepdim=True))
        total, count = total + size.square().sum(), count + real.sum()
    return sum_over_processes(total) / sum_over_processes(count)


def balanced(factor: float) -> Added:
    """What MoLE's balance loss adds; nothing at factor 0."""
    return lambda records: {"balance": (balance(records), factor)} if factor else {}


@torch.no_grad()
def load_entropy(records: Sequence[Record]) -> Tensor:
    """How evenly the routers' choices fall on their experts: 1 for all alike, 0 for one alone.

    The entropy of the choices at real positions over log E, in the mean over routers with several
    experts.

    Raises:
        ValueError: No router spoke.
    """
    found = []
    for record in _of_routers(records):
        picks, _ = real_positions(record, picked(record.output))
        counts = sum_over_processes(picks.reshape(-1, picks.shape[-1]).sum(0))
        here = record.output.logits.isfinite().reshape(-1, len(counts)).any(0)
        often = (counts / counts.sum())[here]
        if len(often) > 1:
            found.append(-torch.special.xlogy(often, often).sum() / math.log(len(often)))
    return torch.stack(found).mean() if found else torch.ones(())


def picked(output: GateOutput) -> Tensor:
    """Which experts a router chose, (..., E), 1 or 0."""
    assert output.experts is not None
    one = F.one_hot(output.experts.clamp_min(0), output.logits.shape[-1])
    return (one * (output.experts != NOBODY).unsqueeze(-1)).sum(-2).float()


def routed(records: Sequence[Record]) -> list[Record]:
    """The records of routers: of gates that choose among their experts."""
    return [r for r in records if r.output.experts is not None and not r.output.slots]


def _of_routers(records: Sequence[Record]) -> list[Record]:
    found = routed(records)
    if not found:
        raise ValueError("no router's result was recorded: run the model inside record()")
    return found
