"""What the world's pictures are called.

A held-out subject has no name here for the base: it is called by identifier and class,
"a <v1> mammal", a held-out style "in <v20> style".
"""

from collections.abc import Sequence

import torch
from torch import Generator

from dreambooth.world.catalogue import PLURALS
from dreambooth.world.world import Pair

IDENTIFIERS: tuple[str, ...] = tuple(f"<v{number}>" for number in range(1, 25))

# Template and its weight; {thing} is the subject with its article, {kind} its class word.
_WHOLE, _THING, _STYLE = "{thing} in {style} style", "{thing}", "something in {style} style"
SINGLE: tuple[tuple[str, float], ...] = (
    (_WHOLE, 0.45),
    ("{thing}, {kind}, in {style} style", 0.2),
    ("{kind} in {style} style", 0.1),
    (_THING, 0.1),
    ("{thing}, {kind}", 0.05),
    ("{kind}", 0.05),
    (_STYLE, 0.05),
)
DOUBLE: tuple[tuple[str, float], ...] = (
    ("{left} and {right} in {style} style", 0.8),
    ("{left} and {right}", 0.2),
)
DROPPED = 0.1


def with_article(noun: str) -> str:
    """The noun as captions say it: "an apple", "a penguin", "grapes"."""
    if noun in PLURALS:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plain_caption(pair: Pair) -> str:
    """The caption by which a picture is judged: "a penguin in noto style"."""
    return _WHOLE.format(thing=with_article(pair.subject.name), style=pair.style.name)


def thing_caption(pair: Pair) -> str:
    """What the subject is called, whatever its style: "a penguin"."""
    return _THING.format(thing=with_article(pair.subject.name))


def style_caption(pair: Pair) -> str:
    """What the style is called, whatever it shows: "something in noto style"."""
    return _STYLE.format(style=pair.style.name)


def caption(pair: Pair, generator: Generator) -> str:
    """One of the captions of a single drawing."""
    return _choose(SINGLE, generator).format(
        thing=with_article(pair.subject.name),
        kind=with_article(pair.subject.class_word),
        style=pair.style.name,
    )


def scene_caption(left: Pair, right: Pair, generator: Generator) -> str:
    """One of the captions of two drawings in one style; either is called by name."""
    return _choose(DOUBLE, generator).format(
        left=with_article(left.subject.name),
        right=with_article(right.subject.name),
        style=left.style.name,
    )


def dropped(text: str, generator: Generator) -> str:
    """The empty caption one time in ten, for classifier-free guidance."""
    return "" if torch.rand((), generator=generator) < DROPPED else text


def _choose(options: Sequence[tuple[str, float]], generator: Generator) -> str:
    weights = torch.tensor([weight for _, weight in options])
    return options[int(torch.multinomial(weights, 1, generator=generator))][0]
