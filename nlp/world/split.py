"""The split: every lemma lies on one side, whatever the task."""

import hashlib

from nlp.world.wordings import SIDES, Side

_UPPER = {"experts": 0.60, "gates": 0.75, "dev": 0.83, "test": 1.0}


def side_of(lemma: str) -> Side:
    """The side of the split on which a lemma lies, by a hash of itself."""
    place = int.from_bytes(hashlib.sha256(lemma.encode()).digest()[:8], "big") / 2**64
    return next(side for side in SIDES if place < _UPPER[side])
