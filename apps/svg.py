"""Pictures of numbers, as SVG that takes the page's own colours."""

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
