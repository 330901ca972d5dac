"""Questions about words' meaning and sound, and about countries."""

import random
from collections.abc import Callable, Mapping, Sequence

from lemminflect import getAllInflections

from nlp.world.sources import Material, inflected
from nlp.world.split import side_of
from nlp.world.wordnet import WordNet

_Answers = Callable[[Material], Mapping[str, str]]
_VAGUE = frozenset({"Tops", "stative"})
"""Fields that say nothing of a word."""


def syllables(material: Material) -> dict[str, str]:
    """The number of a word's syllables: of its sounds that carry a stress mark."""
    sounds = material.sounds
    return {
        word: str(sum(sound[-1].isdigit() for sound in sounds[word]))
        for word in material.words
        if word in sounds
    }


def rhyme(material: Material) -> dict[str, str]:
    """Whether two words rhyme: whether they sound alike from the last stressed vowel on."""
    draw = random.Random(0)
    endings: dict[tuple[str, ...], list[str]] = {}
    for word in material.words:
        sounds = material.sounds.get(word, ())
        stressed = [place for place, sound in enumerate(sounds) if sound[-1] in "12"]
        if stressed:
            endings.setdefault(tuple(sounds[stressed[-1] :]), []).append(word)
    ending_of = {word: ending for ending, words in endings.items() for word in words}
    found = {}
    for word, ending in ending_of.items():
        mates = _beside(word, endings[ending])
        others = [w for w in _beside(word, draw.sample(list(ending_of), 30)) if w not in mates]
        if mates and others:
            yes = draw.random() < 0.5
            found[f"{word}|{draw.choice(mates if yes else others)}"] = "yes" if yes else "no"
    return found


def category(part: str) -> _Answers:
    """The field of a word's first sense; words that are of that part of speech in the main."""

    def answers(material: Material) -> dict[str, str]:
        return {word: net.field(word) for net, word in _words(material, part)}

    return answers


def odd(part: str) -> _Answers:
    """Three words of one field and one of another; all on one side of the split."""

    def answers(material: Material) -> dict[str, str]:
        draw = random.Random(0)
        field_of = {word: net.field(word) for net, word in _words(material, part)}
        by_field: dict[tuple[str, str], list[str]] = {}
        for word, field in field_of.items():
            by_field.setdefault((side_of(word), field), []).append(word)
        alike = [key for key, words in by_field.items() if len(words) >= 12]
        found = {}
        for word, field in field_of.items():
            fields = [key for key in alike if key[0] == side_of(word) and key[1] != field]
            three = draw.sample(by_field[draw.choice(fields)], 3)
            places = draw.sample([word, *three], 4)
            found[", ".join(places)] = word
        return found

    return answers


def is_a(material: Material) -> dict[str, str]:
    """Whether one thing is a kind of another, which is common and up to three steps above it."""
    draw, net, common = random.Random(0), material.nouns, set(material.words)
    wider = {
        word: [kind for step in net.kinds(word)[:3] for kind in sorted(step) if kind in common]
        for _, word in _words(material, "noun")
    }
    wider = {word: [kind for kind in kinds if kind != word] for word, kinds in wider.items()}
    every = sorted({kind for kinds in wider.values() for kind in kinds})
    found = {}
    for word, kinds in wider.items():
        above = {kind for step in net.kinds(word) for kind in step}
        others = [kind for kind in draw.sample(every, 10) if kind not in above and kind != word]
        if kinds and others:
            yes = draw.random() < 0.5
            found[f"{word}|{draw.choice(kinds if yes else others)}"] = "yes" if yes else "no"
    return found


def antonym(material: Material) -> dict[str, str]:
    """The opposite of an adjective, where it has one alone."""
    net, common = material.adjectives, set(material.words)
    found = {}
    for word in material.words:
        opposites = net.opposites(word) & common if word in net else set()
        if len(opposites) == 1:
            found[word] = opposites.pop()
    return found


def continent(material: Material) -> dict[str, str]:
    """Where a country lies."""
    names = material.continents
    return {name: names[found["continent"]] for name, found in material.countries.items()}


def capital(material: Material) -> dict[str, str]:
    """A country's capital."""
    return {
        name: found["capital"] for name, found in material.countries.items() if found["capital"]
    }


def compound_plural(material: Material) -> dict[str, str]:
    """Police officer: police officers. The last word is a common noun with a common plural."""
    plurals, common = inflected("NOUN", "NN", "NNS")(material), set(material.words)
    found = {}
    for name in material.nouns.words():
        first, _, last = name.partition(" ")
        if first in common and last in plurals:
            found[name] = f"{first} {plurals[last]}"
    return found


def phrasal_past(material: Material) -> dict[str, str]:
    """Give up: gave up. A common verb and a particle."""
    pasts, particles = inflected("VERB", "VB", "VBD")(material), {"up", "down", "out", "in", "off"}
    particles |= {"on", "over", "away", "back", "through", "around", "along", "by"}
    found = {}
    for name in material.verbs.words():
        verb, _, particle = name.partition(" ")
        if verb in pasts and particle in particles:
            found[name] = f"{pasts[verb]} {particle}"
    return found


def first_word(asked: str, answer: str) -> str:
    """The lemma of a question of two parts, or of a compound."""
    del answer
    return asked.partition("|")[0].split()[0].rstrip(",")


def last_word(asked: str, answer: str) -> str:
    """The lemma of a compound that is inflected at its end."""
    del answer
    return asked.split()[-1]


def _words(material: Material, part: str) -> list[tuple[WordNet, str]]:
    """Common words of one part of speech, whose field says something; no inflected forms."""
    net = material.nouns if part == "noun" else material.verbs
    tag = {"noun": "NN", "verb": "VB"}[part]
    return [
        (net, word)
        for word in material.words
        if word in net
        and net.field(word) not in _VAGUE
        and word in getAllInflections(word, upos=part.upper()).get(tag, ())
    ]


def _beside(word: str, words: Sequence[str]) -> list[str]:
    """The words but one, on its side of the split."""
    return [other for other in words if other != word and side_of(other) == side_of(word)]
