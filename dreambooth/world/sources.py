"""Where the drawings come from: icon sets and emoji names, fetched from npm by name and version."""

import json
import re
from functools import cache
from pathlib import Path

from mole_vl import npm

PACKAGES: dict[str, str] = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
    "emojibase-data": "17.0.0",
}


def fetch(cache_folder: Path) -> None:
    """Installs the missing packages under `cache_folder` with npm; runs no script of theirs."""
    npm.fetch(cache_folder, PACKAGES)


def subgroups(cache_folder: Path) -> dict[str, str]:
    """The subgroup of each emoji by its label, such as `{"penguin": "animal-bird"}`."""
    package = npm.package(cache_folder, "emojibase-data")
    names = json.loads((package / "meta" / "groups.json").read_text())["subgroups"]
    emojis = json.loads((package / "en" / "data.json").read_text())
    return {e["label"]: names[str(e["subgroup"])] for e in emojis if "subgroup" in e}


def svg(cache_folder: Path, icon_set: str, label: str) -> str:
    """The drawing of one emoji in one icon set, as an SVG document.

    Raises:
        ValueError: the set does not draw it.
    """
    icons = _icons(cache_folder, icon_set)
    slug = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-")
    if slug not in icons["icons"]:
        raise ValueError(f"the icon set {icon_set} has no icon {slug} (for the emoji {label})")
    icon = icons["icons"][slug]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} width="{width}" height="{height}" viewBox="{box}">{icon["body"]}</svg>'


@cache
def _icons(cache_folder: Path, icon_set: str) -> dict:
    return json.loads(
        (npm.package(cache_folder, f"@iconify-json/{icon_set}") / "icons.json").read_text()
    )
