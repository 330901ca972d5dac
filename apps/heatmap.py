"""The gates' weights by block and step, one map for each expert."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from apps.svg import drawing, element, text
from pipelines import WeightMap

# Light to dark along one hue: more is darker.
_LIGHT, _DARK = (240, 237, 250), (76, 29, 149)
_ROW, _SIDE, _TOP, _LEFT, _GAP, _SCALE = 22, 300, 30, 92, 28, 120
# A UNet registers its middle last, and runs it before its upper half.
_RUN = {"down": 0, "mid": 1, "up": 2}


def heat_maps(maps: Mapping[str, WeightMap]) -> str:
    """Part of a page: the maps of all components that ran; empty if none did."""
    return "".join(_component(name, one) for name, one in maps.items() if one.weights.numel())


def short_name(site: str) -> str:
    """A site's name for people: "down 1.0" is the first transformer block of down_blocks.1."""
    half = re.match(r"(down|mid|up)_block", site)
    numbers = re.sub(r"transformer_blocks\.0$", "", site)
    found = re.findall(r"\d+", numbers)
    if half is None:
        return f"layer {found[-1]}" if found else site
    return f"{half[1]} {'.'.join(found)}" if half[1] != "mid" else "mid"


def _component(component: str, one: WeightMap) -> str:
    """A component's maps side by side, over one scale."""
    rows = sorted(range(len(one.sites)), key=lambda row: _order(one.sites[row]))
    names = [short_name(one.sites[row]) for row in rows]
    end = max(1.0, float(one.weights.max()))
    parts = [
        text(name, _LEFT - 10, _TOP + row * _ROW + 15, anchor="end")
        for row, name in enumerate(names)
    ]
    for number, expert in enumerate(one.experts):
        left = _LEFT + number * (_SIDE + _GAP)
        parts.append(text(expert, left, _TOP - 10, kind="name"))
        parts += _cells(one.weights[rows, :, number].tolist(), names, expert, left, end)
    bottom = _TOP + len(rows) * _ROW
    axis = "steps, first to last" if component == "unet" else "prompts"
    parts += [text(axis, _LEFT, bottom + 18), *_scale(_LEFT + _SIDE - _SCALE, bottom + 8, end)]
    width = _LEFT + len(one.experts) * (_SIDE + _GAP) - _GAP
    said = f"weights of {', '.join(one.experts)} in the {component} by block and step"
    return drawing(width + 4, bottom + 26, *parts, label=said)


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
            fill=_colour(value / end),
        )
        for row, (name, values) in enumerate(zip(names, weights, strict=True))
        for column, value in enumerate(values)
    ]


def _scale(left: float, top: float, end: float) -> list[str]:
    parts = 24
    width = _SCALE / parts
    bars = [
        element(
            "rect",
            x=f"{left + n * width:.2f}",
            y=top,
            width=f"{width + 0.5:.2f}",
            height=10,
            fill=_colour(n / (parts - 1)),
        )
        for n in range(parts)
    ]
    return [
        *bars,
        text("0", left - 6, top + 9, anchor="end"),
        text(f"{end:.3g}", left + _SCALE + 6, top + 9),
    ]


def _colour(share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    mixed = (round(a + (b - a) * share) for a, b in zip(_LIGHT, _DARK, strict=True))
    return f"rgb({', '.join(map(str, mixed))})"


def _order(site: str) -> int:
    return _RUN.get(site.partition("_")[0], 0)
