"""Weights by site and step, one map for each expert, as SVG."""

from collections.abc import Mapping, Sequence
from html import escape

from mole_vl.svg import DARK, colour_scale, drawing, element, shade, text

_ROW, _SIDE, _TOP, _GAP = 22, 300, 30, 28
_LETTER = 6.6


def heat_map(
    rows: Sequence[str], weights: Mapping[str, Sequence[Sequence[float]]], *, axis: str, label: str
) -> str:
    """Maps side by side, over one scale from 0 to the greatest weight, or to 1.

    Args:
        rows: What each row is called.
        weights: By expert's name, of each row its values from left to right.
        axis: What runs from left to right.
        label: What the drawing shows, in words.
    """
    end = max(1.0, *(value for map_ in weights.values() for row in map_ for value in row))
    left = max(92.0, 16 + _LETTER * max(map(len, rows)))
    parts = [
        text(name, left - 10, _TOP + number * _ROW + 15, anchor="end")
        for number, name in enumerate(rows)
    ]
    for number, (expert, values) in enumerate(weights.items()):
        start = left + number * (_SIDE + _GAP)
        parts.append(text(expert, start, _TOP - 10, kind="name"))
        parts += _cells(values, rows, expert, start, end)
    bottom = _TOP + len(rows) * _ROW
    scale = colour_scale(left + _SIDE, bottom + 8, 0, end, lambda share: shade(share, DARK))
    parts += [text(axis, left, bottom + 18), *scale]
    width = left + len(weights) * (_SIDE + _GAP) - _GAP
    return drawing(width + 24, bottom + 26, *parts, label=label)


def _cells(
    weights: Sequence[Sequence[float]], names: Sequence[str], expert: str, left: float, end: float
) -> list[str]:
    step = _SIDE / len(weights[0])
    return [
        element(
            "rect",
            element("title", escape(f"{expert}, {name}, step {column + 1}: {value:.2f}")),
            x=f"{left + column * step:.2f}",
            y=_TOP + row * _ROW,
            width=f"{step - 1:.2f}",
            height=_ROW - 2,
            rx=2,
            fill=shade(value / end, DARK),
        )
        for row, (name, values) in enumerate(zip(names, weights, strict=True))
        for column, value in enumerate(values)
    ]
