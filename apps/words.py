"""What calls a LoRA: in the prompt by its trigger words, in a caption by plain ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth.world.candidates import FILE, load_candidates
from dreambooth.world.captions import with_article

_NOTHING = "something"


@dataclass(frozen=True, kw_only=True)
class Words:
    """How sentences speak of what a LoRA knows.

    Args:
        prompt: With its trigger words, for the base.
        caption: In words that any CLIP knows.
        style: Whether it is a style: sentences put it last, after "in".
    """

    prompt: str
    caption: str
    style: bool = False


def world_words(world: Path) -> Mapping[str, Words]:
    """The words of a world's LoRAs, from its identifiers; none if the folder is no world's."""
    if not (world / FILE).is_file():
        return {}
    return {
        known.name: Words(prompt=known.phrase, caption=f"{known.name} style", style=True)
        if known.kind == "style"
        else Words(prompt=known.phrase, caption=with_article(known.name))
        for known in load_candidates(world)
    }


def prompt_of(words: Iterable[Words]) -> str:
    """A prompt that calls all of them: "a <v1> mammal in <v17> style"."""
    return _sentence([(one.prompt, one.style) for one in words])


def caption_of(words: Iterable[Words]) -> str:
    """The same in plain words: "a panda in retro style"."""
    return _sentence([(one.caption, one.style) for one in words])


def _sentence(said: Sequence[tuple[str, bool]]) -> str:
    things = " and ".join(words for words, style in said if not style and words)
    styles = " and ".join(words for words, style in said if style)
    if not styles:
        return things
    return f"{things or _NOTHING} in {styles}"
