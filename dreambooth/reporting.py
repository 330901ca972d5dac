"""How drawings by arm align with what they should show, and tables of it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dreambooth.clip import Clip
from dreambooth.goals import Goals

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Of every arm, by measure, a value for each of its pictures."""


@torch.no_grad()
def alignments(
    clip: Clip, drawings: Mapping[str, Tensor], goals: Goals, truth: Tensor | None = None
) -> dict[str, dict[str, list[float]]]:
    """Alignment of every drawing by arm, as one CLIP sees it.

    Args:
        clip: The CLIP.
        drawings: Pictures (n, 3, h, w) in [-1, 1] by arm.
        goals: As that CLIP sees them.
        truth: The picture (3, h, w) that the drawings should be.

    Returns:
        By arm: `text`, the cosine to the caption, and with a truth `image`, the cosine to it, both
        seen from the mean ordinary picture.
    """
    there = None if truth is None else clip.pictures(truth.unsqueeze(0))[0] - goals.centre
    found = {}
    for name, pictures in drawings.items():
        seen = clip.pictures(pictures)
        found[name] = {"text": (seen @ goals.caption).tolist()}
        if there is not None:
            offset = seen - goals.centre
            cosine = torch.cosine_similarity(offset, there.expand_as(offset), dim=-1)
            found[name]["image"] = cosine.tolist()
    return found


def table_of_arms(caption: str, scores: Scores) -> str:
    """Mean scores by arm and measure, in Markdown."""
    measures = list(next(iter(scores.values())))
    rows = [[name, *(_mean(found[m]) for m in measures)] for name, found in scores.items()]
    return _table([caption, *measures], rows)


def table_of_pairs(scores: Mapping[str, Scores]) -> str:
    """Mean scores by pair, measure and arm, in Markdown."""
    arms = list(next(iter(scores.values())))
    rows = [
        [f"{pair}: {measure}", *(_mean(found[arm][measure]) for arm in arms)]
        for pair, found in scores.items()
        for measure in found[arms[0]]
    ]
    return _table(["", *arms], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, *rows]
    first, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([first, "|---" * len(head) + "|", *rest])


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}"
