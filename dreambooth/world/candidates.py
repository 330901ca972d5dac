"""Pictures for the LoRAs of the emoji world: a folder for each held-out subject and style.

    python -m dreambooth.world.candidates --world worlds/emoji --output out/world

A held-out subject is shown in the base styles alone, a held-out style on train subjects alone: the
subject in that style is left to the mixture. In captions both go by an identifier, which
`identifiers.json` in the world's folder keeps. Beside them: `candidates/ordinary`, a sample of what
the base was trained on, and `truth`, the drawings that a mixture should come to, for judging alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor

from dreambooth.data import METADATA
from dreambooth.world.captions import IDENTIFIERS, with_article
from dreambooth.world.pictures import Pictures
from dreambooth.world.split import base_pairs, held_out_pairs, open_pairs
from dreambooth.world.world import Pair, World
from mole_vl.files import new_file, new_folder

Kind = Literal["subject", "style"]
FILE = "identifiers.json"
ORDINARY = 9
"""One in so many of the base's pictures stands for what is ordinary."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A held-out subject or style, and what captions call it.

    Args:
        name: Of the subject or style.
        kind: Which of the two.
        identifier: Its reserved token.
        noun: A subject's class word; for a style "style".
        split: When it is used: to develop, or to test.
    """

    name: str
    kind: Kind
    identifier: str
    noun: str
    split: str

    @property
    def phrase(self) -> str:
        """How a prompt says it: "a <v1> mammal", "<v17> style"."""
        phrase = f"{self.identifier} {self.noun}"
        return with_article(phrase) if self.kind == "subject" else phrase


def candidates(world: World) -> list[Candidate]:
    """All held-out subjects, then all held-out styles, dev before test, in the world's order."""
    splits = ("dev", "test")
    subjects = [thing for split in splits for thing in world.subjects if thing.split == split]
    styles = [thing for split in splits for thing in world.styles if thing.split == split]
    held_out: list[tuple[Kind, str, str, str]] = [
        *(("subject", subject.name, subject.class_word, subject.split) for subject in subjects),
        *(("style", style.name, "style", style.split) for style in styles),
    ]
    if len(held_out) > len(IDENTIFIERS):
        raise ValueError(
            f"the world holds {len(held_out)} subjects and styles out, "
            f"expected at most {len(IDENTIFIERS)}: the tokenizer reserves no more identifiers"
        )
    return [
        Candidate(name=name, kind=kind, identifier=identifier, noun=noun, split=split)
        for identifier, (kind, name, noun, split) in zip(IDENTIFIERS, held_out, strict=False)
    ]


def candidate_pairs(world: World, candidate: Candidate) -> list[Pair]:
    """What a candidate's LoRA may see."""
    if candidate.kind == "subject":
        return [pair for pair in open_pairs(world) if pair.subject.name == candidate.name]
    return [pair for pair in open_pairs(world) if pair.style.name == candidate.name]


def candidate_captions(pair: Pair, candidate: Candidate) -> list[str]:
    """The captions of one of the candidate's pictures."""
    if candidate.kind == "subject":
        return [f"{candidate.phrase} in {pair.style.name} style"]
    thing, kind = with_article(pair.subject.name), with_article(pair.subject.class_word)
    return [f"{said} in {candidate.phrase}" for said in (thing, f"{thing}, {kind},", kind)]


def write_candidate(folder: Path, pairs: Sequence[Pair], of: Candidate, pictures: Pictures) -> None:
    """Writes one folder of pictures with their captions, as `dreambooth.data` reads it."""
    with new_folder(folder) as partial:
        lines = []
        for pair in pairs:
            file = picture_name(pair)
            _write_picture(partial / file, pictures[pair])
            lines += [{"file_name": file, "text": text} for text in candidate_captions(pair, of)]
        (partial / METADATA).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_plain(folder: Path, pairs: Sequence[Pair], pictures: Pictures) -> None:
    """Writes one folder of pictures without captions."""
    with new_folder(folder) as partial:
        for pair in pairs:
            _write_picture(partial / picture_name(pair), pictures[pair])


def picture_name(pair: Pair) -> str:
    """The file of a pair's picture."""
    return f"{pair.subject.name} in {pair.style.name}.png"


def _write_picture(file: Path, picture: Tensor) -> None:
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file)


def write_candidates(world: Path = Path("worlds/emoji"), output: Path = Path("out/world")) -> None:
    """Writes every candidate's folder, ordinary pictures, the truth, and the identifiers.

    Args:
        world: The folder of the finished world; `identifiers.json` is written into it.
        output: Where the folders of pictures go.
    """
    found = World.load(world)
    pictures = Pictures.load(world, found)
    known = candidates(found)
    for candidate in known:
        pairs = candidate_pairs(found, candidate)
        write_candidate(output / "candidates" / candidate.name, pairs, candidate, pictures)
    # Every ninth: all subjects and styles have their part.
    write_plain(output / "candidates/ordinary", base_pairs(found)[::ORDINARY], pictures)
    write_plain(output / "truth", held_out_pairs(found), pictures)
    with new_file(world / FILE) as partial:
        partial.write_text(json.dumps([asdict(candidate) for candidate in known], indent=1) + "\n")


def load_candidates(world: Path) -> list[Candidate]:
    """Reads `identifiers.json` from a world's folder."""
    return [Candidate(**row) for row in json.loads((world / FILE).read_text())]


if __name__ == "__main__":
    auto_cli(write_candidates)
