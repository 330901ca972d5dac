"""What is to be composed: a held-out subject in a held-out style, by the LoRAs of the two."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.world.candidates import Candidate, load_candidates, picture_name
from dreambooth.world.captions import plain_caption, style_caption, thing_caption
from dreambooth.world.world import Pair, World


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A held-out subject and a held-out style."""

    subject: Candidate
    style: Candidate
    pair: Pair

    @property
    def name(self) -> str:
        """Such as "panda in retro"."""
        return f"{self.subject.name} in {self.style.name}"

    def settings(self, loras: Path, pictures: Path) -> dict[str, Any]:
        """What `SubjectStyle` needs to know of it.

        Args:
            loras: Folder of the LoRAs.
            pictures: Folder of `dreambooth.world.candidates`.
        """
        parts = [self.subject.name, self.style.name]
        return {
            "experts": [loras / part for part in parts],
            "prompt": f"{self.subject.phrase} in {self.style.phrase}",
            "caption": plain_caption(self.pair),
            "words": {
                self.subject.name: thing_caption(self.pair),
                self.style.name: style_caption(self.pair),
            },
            "pictures": {part: pictures / "candidates" / part for part in parts},
            "ordinary": pictures / "candidates/ordinary",
            "truth": pictures / "truth" / picture_name(self.pair),
        }


def compositions(folder: Path, split: str) -> list[Composition]:
    """All pairs of one split's subjects and styles.

    Args:
        folder: The world's.
        split: `dev` or `test`.
    """
    world = World.load(folder)
    mine = [candidate for candidate in load_candidates(folder) if candidate.split == split]
    return [
        Composition(
            subject=subject,
            style=style,
            pair=Pair(world.subject(subject.name), world.style(style.name)),
        )
        for style in mine
        if style.kind == "style"
        for subject in mine
        if subject.kind == "subject"
    ]
