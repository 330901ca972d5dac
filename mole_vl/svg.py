"""Pictures of numbers, as SVG: within a page they take its colours, alone they bring their own."""

from collections.abc import Callable
from html import escape


def element(name: str, *content: str, **attributes: object) -> str:
    """An element; attributes' underscores are hyphens, their values are escaped, content is not."""
    given = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(content)}</{name}>"


def text(words: str, x: float, y: float, *, anchor: str = "start", kind: str = "label") -> str:
    """Words, escaped; their class decides their looks."""
    return element(
        "text", escape(words), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, _class=kind
    )


def drawing(width: float, height: float, *content: str, label: str) -> str:
    """A whole drawing, as wide as its place allows; `label` says what it shows."""
    return element(
        "svg",
        *content,
        viewBox=f"0 0 {width:g} {height:g}",
        _class="numbers",
        role="img",
        aria_label=label,
    )


# Light to dark along one hue: more is darker.
_LIGHT, DARK = (240, 237, 250), (76, 29, 149)
_SCALE = 120


def shade(share: float, dark: tuple[int, int, int]) -> str:
    """A colour from light, at 0, to `dark`, at 1."""
    share = min(max(share, 0.0), 1.0)
    mixed = (round(a + (b - a) * share) for a, b in zip(_LIGHT, dark, strict=True))
    return f"rgb({', '.join(map(str, mixed))})"


def colour_scale(
    right: float, top: float, low: float, high: float, colour: Callable[[float], str]
) -> list[str]:
    """What colours mean: a bar that ends at `right`, from `low`, at share 0, to `high`, at 1."""
    parts = 24
    left, width = right - _SCALE, _SCALE / parts
    bars = [
        element(
            "rect",
            x=f"{left + n * width:.2f}",
            y=top,
            width=f"{width + 0.5:.2f}",
            height=10,
            fill=colour(n / (parts - 1)),
        )
        for n in range(parts)
    ]
    return [
        *bars,
        text(f"{low:.3g}", left - 6, top + 9, anchor="end"),
        text(f"{high:.3g}", right + 6, top + 9),
    ]


_LOOKS = "text{font:11px sans-serif;fill:#555}.name{font-weight:bold;fill:#222}"


def standalone(drawn: str) -> str:
    """A drawing as a file of its own, with its looks on white."""
    head, rest = drawn.split(">", 1)
    ground = element("rect", width="100%", height="100%", fill="white")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{element("style", _LOOKS)}{ground}{rest}\n'
