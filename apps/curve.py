"""The course of a loss, drawn as it grows."""

from collections.abc import Mapping, Sequence

from mole_vl.svg import drawing, element, text

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 230, 52, 92, 14, 34
_KEPT = 0.8


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean that forgets a fifth at each step, unbiased from the first on."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total = _KEPT * total + (1 - _KEPT) * value
        weight = _KEPT * weight + (1 - _KEPT)
        found.append(total / weight)
    return found


def loss_curve(terms: Mapping[str, Sequence[float]], steps: int) -> str:
    """Part of a page: each term's course over all steps of a run, raw and smoothed.

    Args:
        terms: Values by term, one for each step done.
        steps: Steps in all.
    """
    known = [value for values in terms.values() for value in values]
    if not known:
        return ""
    low, high = min(known), max(known)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def place(step: float, value: float) -> tuple[float, float]:
        across = (_WIDTH - _LEFT - _RIGHT) * (step - 1) / max(1, steps - 1)
        down = (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)
        return _LEFT + across, _TOP + down

    def line(values: Sequence[float], kind: str) -> str:
        places = [place(step, value) for step, value in enumerate(values, start=1)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return element("polyline", points=points, _class=kind)

    parts = []
    for part in range(5):
        value = low + (high - low) * part / 4
        x, y = place(1, value)
        parts.append(element("line", x1=x, y1=y, x2=_WIDTH - _RIGHT, y2=y, _class="grid"))
        parts.append(text(f"{value:.3f}", x - 8, y + 4, anchor="end"))
    for step in sorted({1, (1 + steps) // 2, steps}):
        parts.append(text(str(step), place(step, low)[0], _HEIGHT - _BOTTOM + 18, anchor="middle"))
    for number, (name, values) in enumerate(terms.items()):
        soft = smoothed(values)
        x, y = place(len(values), soft[-1])
        parts += [line(values, f"raw term{number % 3}"), line(soft, f"soft term{number % 3}")]
        parts.append(
            element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.5, _class=f"term{number % 3}")
        )
        parts.append(text(name, x + 8, y + 4, kind=f"name term{number % 3}"))
    return drawing(_WIDTH, _HEIGHT, *parts, label="the loss of each step")
