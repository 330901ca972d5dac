"""Multiple choice from WordNet, in ScienceQA's own fields: the odd one out, and what a word names.

Every word lies on one side of the text world's split, in both kinds of question.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from nlp.world.split import side_of
from nlp.world.wordings import Side
from nlp.world.wordnet import WordNet

NAME = "wordnet"
"""What the dataset is called."""

_SIDES: Mapping[Side, str] = {
    "experts": "train",
    "gates": "train",
    "dev": "validation",
    "test": "test",
}
_VAGUE = "Tops"
_FEWEST = 12
"""Words of a field that has an odd one out, as in the text world's own."""
_OPTIONS = 4
_ODD = (
    "Which word is not like the others?",
    "Which word does not belong with the others?",
    "Find the odd one out.",
)
_CATEGORY = (
    'To which category does the word "{}" belong?',
    'What does the word "{}" name?',
    'Under which heading would you list the word "{}"?',
)
_LECTURE = (
    "Nouns can be sorted by what they name, such as an animal, an act or a feeling.\n"
    "Words that name the same sort of thing belong to one category."
)


def questions(net: WordNet) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split: for each common noun, what it names and, in its company, the odd one out.

    Common are those whose senses WordNet's makers met in the texts that they tagged.

    Args:
        net: WordNet's nouns.

    Raises:
        ValueError: Too few words for four options on one of the sides.
    """
    by_split: dict[str, dict[str, str]] = {split: {} for split in _SIDES.values()}
    for word in net.words():
        if _is_common(net, word):
            by_split[_SIDES[side_of(word)]][word] = net.field(word)
    return {split: _rows(net, split, fields) for split, fields in by_split.items()}


def _is_common(net: WordNet, word: str) -> bool:
    plain = len(word) > 2 and word.isascii() and word.isalpha()
    return bool(
        plain and net.tagged(word) and net.spelt(word) == word and net.field(word) != _VAGUE
    )


def _rows(net: WordNet, split: str, fields: Mapping[str, str]) -> list[dict[str, Any]]:
    draw = random.Random(split)
    mates: dict[str, list[str]] = {}
    for word, field in fields.items():
        mates.setdefault(field, []).append(word)
    many = [field for field, words in mates.items() if len(words) >= _FEWEST]
    if len(many) < 2 or len(mates) < _OPTIONS:
        raise ValueError(
            f"{NAME}: the split {split!r} has {len(fields)} common nouns in {len(mates)} "
            f"categories, expected {_OPTIONS} categories, two of them with {_FEWEST} nouns"
        )
    rows = []
    for word, field in fields.items():
        rows.append(_category(net, word, field, sorted(mates), draw))
        other = draw.choice([one for one in many if one != field])
        rows.append(_odd(word, field, other, draw.sample(mates[other], _OPTIONS - 1), draw))
    draw.shuffle(rows)
    return rows


def _category(
    net: WordNet, word: str, field: str, fields: Sequence[str], draw: random.Random
) -> dict[str, Any]:
    others = draw.sample([one for one in fields if one != field], _OPTIONS - 1)
    above = [kind for step in net.kinds(word)[:1] for kind in sorted(step) if kind not in fields]
    return _row(
        question=draw.choice(_CATEGORY).format(word),
        choices=draw.sample([field, *others], _OPTIONS),
        right=field,
        hint=f"In a dictionary the entry of {word} begins: a kind of {above[0]}." if above else "",
        skill="Name the category of a word",
        solution=f'The word "{word}" belongs to the category {field}.',
    )


def _odd(
    word: str, field: str, other: str, three: Sequence[str], draw: random.Random
) -> dict[str, Any]:
    return _row(
        question=draw.choice(_ODD),
        choices=draw.sample([word, *three], _OPTIONS),
        right=word,
        hint="",
        skill="Find the odd one out",
        solution=f"{', '.join(three[:-1])} and {three[-1]} belong to the category {other}.\n"
        f"{word} belongs to the category {field}.",
    )


def _row(
    *, question: str, choices: Sequence[str], right: str, hint: str, skill: str, solution: str
) -> dict[str, Any]:
    return {
        "image": None,
        "question": question,
        "choices": list(choices),
        "answer": choices.index(right),
        "hint": hint,
        "task": "closed choice",
        "grade": "",
        "subject": "language science",
        "topic": "vocabulary",
        "category": "Categories",
        "skill": skill,
        "lecture": _LECTURE,
        "solution": solution,
    }
