"""The emoji world as a whole: its subjects, its styles, what is withheld, and its pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from dreambooth.world.catalogue import Subject
from dreambooth.world.styles import Style

FILE = "world.json"
_Named = TypeVar("_Named", Subject, Style)


@dataclass(frozen=True)
class Pair:
    """A subject in a style: one picture of the world."""

    subject: Subject
    style: Style

    @property
    def drawing(self) -> tuple[str, str]:
        """The drawing behind the picture: pairs that share it show the same lines."""
        return self.subject.name, self.style.drawing


@dataclass(frozen=True, kw_only=True)
class World:
    """Who is in the world.

    Args:
        subjects: In the order of the atlases' cells.
        styles: One atlas each.
        withheld: Drawings (subject name, drawing) of trained subjects in base styles that no model
            sees: the truth that pictures of trained parts are measured against.
    """

    subjects: tuple[Subject, ...]
    styles: tuple[Style, ...]
    withheld: frozenset[tuple[str, str]]

    def pairs(self) -> list[Pair]:
        """Every picture, style by style."""
        return [Pair(subject, style) for style in self.styles for subject in self.subjects]

    def save(self, folder: Path) -> None:
        """Writes `world.json`."""
        content = {
            "subjects": [asdict(subject) for subject in self.subjects],
            "styles": [asdict(style) for style in self.styles],
            "withheld": sorted(self.withheld),
        }
        partial = folder / f"{FILE}.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.rename(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "World":
        """Reads `world.json` from a world's folder."""
        content = json.loads((folder / FILE).read_text())
        return cls(
            subjects=tuple(Subject(**row) for row in content["subjects"]),
            styles=tuple(Style(**row) for row in content["styles"]),
            withheld=frozenset((subject, drawing) for subject, drawing in content["withheld"]),
        )

    def subject(self, name: str) -> Subject:
        """The subject called `name`; ValueError if the world has none."""
        return _by_name(self.subjects, name)

    def style(self, name: str) -> Style:
        """The style called `name`; ValueError if the world has none."""
        return _by_name(self.styles, name)


def _by_name(things: Sequence[_Named], name: str) -> _Named:
    found = next((thing for thing in things if thing.name == name), None)
    if found is None:
        known = ", ".join(thing.name for thing in things)
        raise ValueError(f"the emoji world has no {name!r}; it has: {known}")
    return found
