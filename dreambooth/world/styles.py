"""The styles of the emoji world: six icon sets by other hands, and two renderings derived here.

Styles that render one and the same drawing share its `drawing`. A split never runs through a
drawing: who has seen the flat penguin has seen the outline of the fluent one.
"""

from dataclasses import dataclass
from typing import Literal

StyleSplit = Literal["base", "dev", "test"]
Rendering = Literal["plain", "pixel", "sketch"]


@dataclass(frozen=True, kw_only=True)
class Style:
    """One way to draw everything: the icon set it comes from and how that is rendered."""

    name: str
    icon_set: str
    drawing: str
    split: StyleSplit
    rendering: Rendering = "plain"


STYLES: tuple[Style, ...] = (
    Style(name="noto", icon_set="noto", drawing="noto", split="base"),
    Style(name="fluent", icon_set="fluent-emoji", drawing="fluent", split="base"),
    Style(name="flat", icon_set="fluent-emoji-flat", drawing="fluent", split="base"),
    Style(name="pixel", icon_set="noto", drawing="noto", split="base", rendering="pixel"),
    Style(name="sketch", icon_set="noto", drawing="noto", split="base", rendering="sketch"),
    Style(name="retro", icon_set="noto-v1", drawing="noto-v1", split="dev"),
    Style(name="contrast", icon_set="fluent-emoji-high-contrast", drawing="fluent", split="test"),
    Style(name="twemoji", icon_set="twemoji", drawing="twemoji", split="test"),
)
