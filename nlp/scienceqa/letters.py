"""The letter in what a model says."""

import re
from collections.abc import Collection

ANSWER = re.compile(r"The answer is ([A-Z])\.")
"""ScienceQA's and MoLA's, with the full stop that was meant."""


def letters_in(text: str) -> list[str]:
    """The letter of each "The answer is X." in a text."""
    return ANSWER.findall(text)


def letter_of(text: str, options: Collection[str] | None = None) -> str | None:
    """The one letter that a text gives for an answer; None where it gives none, or several.

    Args:
        text: What was said.
        options: The letters that there are to choose from; None for any.
    """
    found = set(letters_in(text))
    if len(found) != 1:
        return None
    (letter,) = found
    return letter if options is None or letter in options else None
