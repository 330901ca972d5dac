"""Write the text world's task of few examples: `python -m nlp.world.fewshot` (10 s).

The third person singular of verbs (go: goes), which no expert of the world was trained on, as
tables of the columns verb and form: 16 examples, and held-out rows. Verbs lie on the sides of the
world's split, so that no expert has seen them. Needs lemminflect and the base's tokenizer.
"""

import csv
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli

from mole_vl.faults import at_least, refuse
from mole_vl.files import new_file
from nlp.models import BUILT_IN, load_tokenizer
from nlp.world.sources import Material, common_words
from nlp.world.split import side_of
from nlp.world.tasks import third_person
from nlp.world.wordings import Side

_SIDES: dict[str, Side] = {"train": "gates", "dev": "dev", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class FewConfig:
    """How many rows there are.

    Args:
        output: Folder of the tables.
        base: The model whose vocabulary says which verbs are common.
        train: Examples.
        held_out: Rows for development, and as many for the test, at most.
        seed: Seed of the draw of verbs.
    """

    output: Path = Path("worlds/text/fewshot")
    base: str = BUILT_IN
    train: int = 16
    held_out: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(
            "FewConfig",
            [at_least("train", self.train, 1), at_least("held_out", self.held_out, 1)],
        )


def drawn(forms: Mapping[str, str], config: FewConfig) -> dict[str, list[tuple[str, str]]]:
    """Pairs of verb and form of each table, drawn from its side of the split."""
    tables = {}
    for name, side in _SIDES.items():
        mine = sorted(verb for verb in forms if side_of(verb) == side)
        random.Random(f"{config.seed} third person {side}").shuffle(mine)
        number = config.train if name == "train" else config.held_out
        tables[name] = [(verb, forms[verb]) for verb in mine[:number]]
    return tables


def main(config: FewConfig) -> None:
    """Write the tables."""
    forms = third_person(Material(common_words(load_tokenizer(config.base)), config.output))
    for name, pairs in drawn(forms, config).items():
        path = config.output / f"third_person_{name}.csv"
        with new_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("verb", "form"), *pairs])
        print(f"{path}: {len(pairs)} rows")


if __name__ == "__main__":
    main(auto_cli(FewConfig, as_positional=False))
