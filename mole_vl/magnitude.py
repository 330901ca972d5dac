"""The k-th largest of more numbers than fit into memory."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HALF = 16


def kth_largest(parts: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th largest magnitude among all parts' entries, exactly, as fp32 has them.

    Magnitudes in fp32 are ordered as their bits are, read as whole numbers: one pass counts the
    upper halves of the bits, a second the lower halves of those that share the upper half found.

    Args:
        parts: Gives the parts anew at each call, one in memory at a time.
        k: From 1 to the number of entries.
    """
    upper, above = _place(_counted(parts, lambda bits: bits >> _HALF), k)
    lower, _ = _place(
        _counted(parts, lambda bits: bits[bits >> _HALF == upper] & (1 << _HALF) - 1), k - above
    )
    bits = torch.tensor(upper << _HALF | lower, dtype=torch.int32)
    return float(bits.view(torch.float32))


def _counted(parts: Callable[[], Iterable[Tensor]], half: Callable[[Tensor], Tensor]) -> Tensor:
    """How often each half of the bits occurs, (2^16,)."""
    counts = torch.zeros(1 << _HALF, dtype=torch.int64)
    for part in parts():
        bits = part.float().abs().flatten().view(torch.int32)
        counts += torch.bincount(half(bits), minlength=1 << _HALF).cpu()
    return counts


def _place(counts: Tensor, k: int) -> tuple[int, int]:
    """The value that the k-th largest has, and how many are larger."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    value = int((at_least >= k).nonzero().max())
    return value, int(at_least[value] - counts[value])
