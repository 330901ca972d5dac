"""What a gate over rows reads of a row's positions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled_mean(x: Tensor, pool: Tensor | None) -> Tensor:
    """Mean of a row's pooled positions, each of length 1: (rows, positions, d) to (rows, d).

    Without the normalisation a few positions of giant norm, such as the attention sinks of
    language models, drown all others, and rows hardly differ.

    Raises:
        ValueError: The mask has other positions than the input, or a row pools none.
    """
    if x.dim() == 2:
        return x
    if x.dim() != 3:
        raise ValueError(
            f"a gate reads (rows, positions, width) or (rows, width), got {tuple(x.shape)}"
        )
    if pool is None:
        return F.normalize(x.float(), dim=-1).mean(1)
    if pool.shape != x.shape[:2]:
        raise ValueError(
            f"the pooled positions are given as {tuple(pool.shape)}, but the site reads "
            f"{tuple(x.shape[:2])} rows and positions"
        )
    # A padded position may hold anything, infinities too: it must not meet a product, nor a norm.
    real = F.normalize(x.float().masked_fill(~pool.unsqueeze(-1), 0.0), dim=-1)
    count = pool.sum(1, keepdim=True)
    if not (count > 0).all():
        raise ValueError("a row pools no position: it has no real input to gate on")
    return real.sum(1) / count


def max_pooled(x: Tensor, pool: Tensor | None) -> Tensor:
    """The largest of a row's pooled positions, number by number, each position of length 1.

    Shapes and mask are those of `pooled_mean`, which checks them.
    """
    if x.dim() == 2:
        return x.float()
    if pool is None:
        return F.normalize(x.float(), dim=-1).amax(1)
    out = ~pool.unsqueeze(-1)
    real = F.normalize(x.float().masked_fill(out, 0.0), dim=-1)
    return real.masked_fill(out, -1.0).amax(1)


def last_pooled(x: Tensor, pool: Tensor | None) -> Tensor:
    """A row's last pooled position, wherever its padding stands.

    Shapes and mask are those of `pooled_mean`, which checks them.
    """
    if x.dim() == 2:
        return x.float()
    if pool is None:
        return x[:, -1].float()
    places = torch.arange(x.shape[1], device=x.device)
    last = places.masked_fill(~pool, -1).amax(1)
    return x[torch.arange(len(x), device=x.device), last].float()
