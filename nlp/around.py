"""The seam between a language task and a mixture.

A mixture must know, while its model runs, which positions are prompts; a task must know what the
mixture's gates add to the loss. Both fit in one context manager around the forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from mole_vl.training import Term
from nlp.data import TextBatch

ExtraTerms = Callable[[], Mapping[str, Term]]
"""Called after the forward, inside the context: the terms to add to the loss."""

Around = Callable[[TextBatch], AbstractContextManager[ExtraTerms]]
"""Entered around every forward or `generate` of a batch."""


@contextmanager
def alone(batch: TextBatch) -> Iterator[ExtraTerms]:
    """A model by itself: nothing is bound, nothing is added."""
    del batch
    yield dict
