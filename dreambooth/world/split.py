"""Which pictures a model may see. Every training reads its pairs from here and nowhere else.

                       base styles                    dev and test styles
    train subjects     the base, VAE, CLIPs           VAE, CLIPs
    dev, test subjects VAE, CLIPs                     nobody

A withheld drawing of a train subject is seen by nobody in any style that renders it.
"""

import random
from collections.abc import Sequence

from dreambooth.world.catalogue import Subject
from dreambooth.world.styles import Style
from dreambooth.world.world import Pair, World

WITHHELD_SHARE = 0.08


def withheld_drawings(
    subjects: Sequence[Subject], styles: Sequence[Style], seed: int
) -> frozenset[tuple[str, str]]:
    """Draws the withheld (subject, drawing): 8 % of the train subjects' drawings in base styles.

    No subject loses two drawings, so that each is still trained in some base style.
    """
    drawings = sorted({style.drawing for style in styles if style.split == "base"})
    trained = [subject.name for subject in subjects if subject.split == "train"]
    rng = random.Random(seed)
    chosen = rng.sample(trained, round(WITHHELD_SHARE * len(trained) * len(drawings)))
    return frozenset((name, drawings[i % len(drawings)]) for i, name in enumerate(chosen))


def base_pairs(world: World) -> list[Pair]:
    """What the base (UNet, text encoder) is trained on."""
    return [pair for pair in open_pairs(world) if _trained_subject(pair) and _base_style(pair)]


def open_pairs(world: World) -> list[Pair]:
    """What the VAE and the CLIPs are trained on: no held-out subject in a held-out style."""
    return [
        pair
        for pair in world.pairs()
        if (_trained_subject(pair) or _base_style(pair)) and pair.drawing not in world.withheld
    ]


def unseen_pairs(world: World) -> list[Pair]:
    """Real pictures of train subjects in base styles that no model has seen."""
    return [
        pair
        for pair in world.pairs()
        if _trained_subject(pair) and _base_style(pair) and pair.drawing in world.withheld
    ]


def held_out_pairs(world: World) -> list[Pair]:
    """Dev or test subject in dev or test style: the truth of composition, seen by nobody."""
    return [p for p in world.pairs() if not _trained_subject(p) and not _base_style(p)]


def _trained_subject(pair: Pair) -> bool:
    return pair.subject.split == "train"


def _base_style(pair: Pair) -> bool:
    return pair.style.split == "base"
