"""Clusters as a picture: who is like whom, one cluster after the other, as SVG."""

from collections.abc import Iterator
from functools import partial
from html import escape

from mole_vl.clusters import Clusters
from mole_vl.svg import DARK, colour_scale, drawing, element, shade, text

_CELL, _GAP, _LETTER, _MARGIN = 22, 6, 6.6, 12
# Experts that are unlike, in another hue.
_UNLIKE = (146, 64, 14)
_SELF = "rgb(214, 211, 220)"


def cluster_map(clusters: Clusters) -> str:
    """The cosines of all pairs, the experts of a cluster side by side and framed, as SVG.

    The colours' scale ends at the largest cosine of two experts, whose own, 1, are left grey. For a
    file of its own: `mole_vl.svg.standalone`.
    """
    order = clusters.order
    cosines = clusters.similarity[list(order)][:, list(order)].tolist()
    names = [clusters.names[place] for place in order]
    places = list(_places(clusters))
    side = places[-1] + _CELL
    end = max((abs(c) for i, row in enumerate(cosines) for c in row[:i]), default=0.0) or 1.0
    room = 2 * _MARGIN + _LETTER * max(map(len, names))
    colour = partial(_colour, end)
    cells = [
        element(
            "rect",
            element("title", f"{escape(one)}, {escape(other)}: {cosines[i][j]:.3f}"),
            x=f"{room + places[j]:g}",
            y=f"{room + places[i]:g}",
            width=_CELL - 1,
            height=_CELL - 1,
            fill=_SELF if i == j else colour(cosines[i][j]),
        )
        for i, one in enumerate(names)
        for j, other in enumerate(names)
    ]
    rows = [
        text(name, room - _MARGIN, room + place + 15, anchor="end")
        for name, place in zip(names, places, strict=True)
    ]
    columns = [
        element(
            "g",
            text(name, 0, 0),
            transform=f"translate({room + place + 15:g} {room - _MARGIN:g}) rotate(-90)",
        )
        for name, place in zip(names, places, strict=True)
    ]
    bottom = room + side
    scale = colour_scale(
        room + side - 40, bottom + 16, -end, end, lambda share: colour((2 * share - 1) * end)
    )
    return drawing(
        max(bottom, room + 240) + _MARGIN,
        bottom + 40,
        *cells,
        *_frames(clusters, places, room),
        *rows,
        *columns,
        text(f"cosine of {clusters.measure}", _MARGIN, bottom + 25),
        *scale,
        label=f"cosines of {len(names)} experts in {len(clusters.groups)} clusters",
    )


def _places(clusters: Clusters) -> Iterator[int]:
    """Where each row begins: clusters stand a gap apart."""
    row = 0
    for number, group in enumerate(clusters.groups):
        for _ in group:
            yield row * _CELL + number * _GAP
            row += 1


def _frames(clusters: Clusters, places: list[int], room: float) -> Iterator[str]:
    first = 0
    for group in clusters.groups:
        start, size = room + places[first] - 1.5, len(group) * _CELL + 2
        yield element("rect", x=start, y=start, width=size, height=size, fill="none", stroke="#222")
        first += len(group)


def _colour(end: float, cosine: float) -> str:
    return shade(abs(cosine) / end, DARK if cosine >= 0 else _UNLIKE)
