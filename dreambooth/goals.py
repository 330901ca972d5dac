"""What a picture should show, as a CLIP sees it, and how far one is from it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Goals:
    """Where CLIP should see pictures; d is its width, E the experts.

    Args:
        caption: What they should show, in words, (d,).
        centre: Mean feature of ordinary pictures, (d,).
        offset: Where a picture with all experts' traits lies, seen from the centre, (d,).
        own: Mean feature of each expert's own pictures, (E, d).
        words: What those show, in words, (E, d); of no rows where it was not said.
    """

    caption: Tensor
    centre: Tensor
    offset: Tensor
    own: Tensor
    words: Tensor

    @classmethod
    def of_rows(cls, goals: Sequence["Goals"], times: int) -> "Goals":
        """The goals of rows, each `times` in a row: (rows * times, ...) in every field."""
        together = (torch.stack([getattr(one, f.name) for one in goals]) for f in fields(cls))
        return cls(*(tensor.repeat_interleave(times, 0) for tensor in together))

    def to(self, device: torch.device) -> "Goals":
        """The same on a device."""
        return Goals(*(tensor.to(device) for tensor in vars(self).values()))


def away(features: Tensor, goal: Tensor) -> Tensor:
    """Mean of 1 - cosine between features (rows, d) and a goal (d,) or (rows, d)."""
    return (1 - F.cosine_similarity(features, goal.expand_as(features), dim=-1)).mean()


def directional(features: Tensor, goals: Goals) -> Tensor:
    """How far pictures lie from where the words point: directional CLIP loss (2108.00946, eq. 1).

    From each expert's own pictures the ones seen, (rows, d), are to lie in the direction in which
    the caption lies from those pictures' words. The mean over rows and experts.

    Args:
        features: Of the pictures.
        goals: With a leading dimension of the same rows.
    """
    seen = features.unsqueeze(1) - goals.own
    told = goals.caption.unsqueeze(1) - goals.words
    return (1 - F.cosine_similarity(seen, told, dim=-1)).mean()


def composed(centre: Tensor, parts: Tensor) -> Tensor:
    """Where a picture with all parts' traits lies, seen from a centre: the sum of their offsets.

    Args:
        centre: Mean feature of ordinary pictures, (d,).
        parts: Mean feature of each part's own pictures, (parts, d).

    Returns:
        An offset from the centre, (d,), to be compared with `features - centre`.
    """
    return (parts - centre).sum(0)
