"""Chance that belongs to a row: what is drawn for it is the same whoever runs beside it.

In one process or two, in micro-batches, alone or among other tenants, a row's dropout and jitter
are its own. Nothing is drawn one after the other: each number is a hash of the row's seed, of what
it is drawn for, of its position and of its channel.

Shape legend: r rows, p positions, d width.
"""

from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

_POSITION, _CHOICE, _CHANNEL = 0xC2B2AE35, 0x85EBCA6B, 0x9E3779B9
_WHOLE = 2**32


def keys_of(seeds: Tensor, name: str, positions: int) -> Tensor:
    """What chance is drawn from at each position of each row, (r, p) int32.

    Args:
        seeds: Of the rows, (r,) int64.
        name: What is drawn for, such as a layer's path.
        positions: How many each row has; a position's key hangs on no other.
    """
    folded = (seeds ^ (seeds >> 32) ^ crc32(name.encode())) & (_WHOLE - 1)
    rows = _mixed(torch.where(folded < _WHOLE // 2, folded, folded - _WHOLE).int())
    places = torch.arange(positions, device=seeds.device, dtype=torch.int32)
    return _mixed(rows.unsqueeze(-1) + places * _signed(_POSITION))


def keys_of_choices(keys: Tensor, choices: Tensor) -> Tensor:
    """Keys of the experts that one position has, each with chance of its own.

    Args:
        keys: The positions', int32.
        choices: Which of its position's experts each is, of the keys' shape; 0 for the first, whose
            key is the position's, as where there is but one.
    """
    return keys ^ _mixed(choices.int() * _signed(_CHOICE))


def chances(keys: Tensor, width: int) -> Tensor:
    """Numbers from U(0, 1), (..., d) in fp32, of keys (...)."""
    return (_drawn(keys, width) & (2**24 - 1)).float() / 2**24


def dropped(x: Tensor, share: float, keys: Tensor) -> Tensor:
    """Dropout: a share of x's numbers is zero, the others make up for it.

    Args:
        x: (..., d).
        share: Which share, 0 to 1.
        keys: (...).
    """
    if share >= 1:
        return x * 0.0
    least = int(share * _WHOLE) - _WHOLE // 2
    return torch.where(_drawn(keys, x.shape[-1]) >= least, x / (1 - share), 0.0)


def dropout(x: Tensor, share: float, seeds: Tensor | None, name: str) -> Tensor:
    """Dropout by row; from torch's own generator where rows have no seeds.

    Args:
        x: (r, ..., d).
        share: Which share of x's numbers is zero.
        seeds: Of the rows, (r,) int64.
        name: As of `keys_of`.
    """
    if seeds is None:
        return F.dropout(x, share)
    lead = x.shape[:-1]
    return dropped(x, share, keys_of(seeds, name, lead[1:].numel()).view(lead))


def _drawn(keys: Tensor, width: int) -> Tensor:
    """Any int32 with the same chance, (..., d)."""
    channels = torch.arange(width, device=keys.device, dtype=torch.int32)
    return _mixed(keys.unsqueeze(-1) + channels * _signed(_CHANNEL))


def _mixed(x: Tensor) -> Tensor:
    """A hash of int32 in place, each bit of which hangs on every bit (lowbias32, Wellons 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= (x >> shift) & (2 ** (32 - shift) - 1)
        x *= _signed(factor)
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(factor: int) -> int:
    return factor if factor < _WHOLE // 2 else factor - _WHOLE
