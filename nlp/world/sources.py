"""What the four tasks ask: a lemma and its answer, from packages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lemminflect import getAllInflections, getInflection
from num2words import num2words

from nlp.data import Tokenizer
from nlp.world.wordings import PAST, PLURAL, Wordings, number_wordings

LARGEST = 999
"""Numbers run from 0 to this."""


@dataclass(frozen=True)
class Source:
    """One task: its name, its answers by lemma (a word, or a number in digits), its wordings."""

    name: str
    answers: Callable[[Sequence[str]], Mapping[str, str]]
    wordings: Wordings


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


def _inflected(words: Sequence[str], part: str, base: str, tag: str) -> dict[str, str]:
    """The form `tag` of each word that is the `base` form of that part of speech.

    Words with two such forms are left out, and words whose form is not common: a verb by the
    dictionary alone (to mantle) has no common past.
    """
    common = set(words)
    found = {}
    for word in words:
        if word in getAllInflections(word, upos=part).get(base, ()):
            forms = getInflection(word, tag, inflect_oov=False)
            if len(forms) == 1 and forms[0] in common:
                found[word] = forms[0]
    return found


def past_tense(words: Sequence[str]) -> dict[str, str]:
    """walk: walked."""
    return _inflected(words, "VERB", "VB", "VBD")


def plural(words: Sequence[str]) -> dict[str, str]:
    """child: children. Nouns that stay as they are (sheep) are left out."""
    found = _inflected(words, "NOUN", "NN", "NNS")
    return {word: form for word, form in found.items() if form != word}


def _numbers(language: str) -> Callable[[Sequence[str]], dict[str, str]]:
    def answers(words: Sequence[str]) -> dict[str, str]:
        del words
        return {str(n): num2words(n, lang=language) for n in range(LARGEST + 1)}

    return answers


SOURCES = (
    Source("past", past_tense, PAST),
    Source("plural", plural, PLURAL),
    Source(
        "french",
        _numbers("fr"),
        number_wordings("French", "A Frenchman", "Paris", "France"),
    ),
    Source(
        "german",
        _numbers("de"),
        number_wordings("German", "A German", "Berlin", "Germany"),
    ),
)
