"""Write the text world's rows: `python -m nlp.world.build` (a minute).

Every lemma (a word, or a number) lies on one side of the split in all tasks, by a hash of itself:
what one expert has seen is no other's test. Needs lemminflect, num2words, npm and the base's
tokenizer.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli

from mole_vl import npm
from nlp.data import TextRow, write_rows
from nlp.models import BUILT_IN, load_tokenizer
from nlp.world.packages import FOLDER, PACKAGES
from nlp.world.sources import Material, Source, common_words
from nlp.world.split import side_of
from nlp.world.tasks import DEVELOPMENT, FOUR, HELD_OUT, SHELF
from nlp.world.wordings import Side

TRAIN = 2400
"""Rows of a task that an expert learns from."""
STREAMS: Mapping[str, Side] = {"train": "gates", "dev": "dev", "test": "test"}
"""The mixed streams, and their sides."""
EACH = {
    "mixed": {"train": 240, "dev": 90, "test": 100},
    "shelf": {"train": 100, "dev": 25, "test": 50},
}
"""Rows of each task in a stream of the four, and of the whole shelf."""
FEW, ASKED = 500, 200
"""Rows of a task of few examples: those that examples are drawn from, and those asked."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Where the text world is written.

    Args:
        output: Folder of the JSON-lines files.
        base: The model whose vocabulary says which words are common.
        packages: Folder where npm installs the dictionaries.
        seed: Seed of the draw of lemmas and wordings.
    """

    output: Path = Path("worlds/text/data")
    base: str = BUILT_IN
    packages: Path = FOLDER
    seed: int = 0


def rows_of(
    source: Source, side: Side, material: Material, number: int, seed: int
) -> list[TextRow]:
    """`number` rows of one task and side, or as many as it has.

    Everything asked once, then everything again in another wording, and so on.
    """
    answers = {
        asked: answer
        for asked, answer in source.answers(material).items()
        if side_of(source.lemma(asked, answer)) == side
    }
    wordings = source.wordings[side]
    draw = random.Random(f"{seed} {source.name} {side}")
    every = sorted(answers)
    draw.shuffle(every)
    first = {asked: draw.randrange(len(wordings)) for asked in every}
    rows = [
        TextRow(
            wordings[(first[asked] + turn) % len(wordings)].format(*asked.split("|")),
            answers[asked],
            source.name,
        )
        for turn in range(len(wordings))
        for asked in every
    ]
    return rows[:number]


def build(config: WorldConfig) -> Mapping[str, Sequence[TextRow]]:
    """All rows of the world by the name of their file."""
    npm.fetch(config.packages, PACKAGES)
    material = Material(common_words(load_tokenizer(config.base)), config.packages)

    def rows(source: Source, side: Side, number: int) -> list[TextRow]:
        return rows_of(source, side, material, number, config.seed)

    files: dict[str, Sequence[TextRow]] = {
        f"{source.name}_train": rows(source, "experts", TRAIN) for source in SHELF
    }
    for family, sources in (("mixed", FOUR), ("shelf", SHELF)):
        draw = random.Random(config.seed)
        for name, side in STREAMS.items():
            mixed = [row for source in sources for row in rows(source, side, EACH[family][name])]
            draw.shuffle(mixed)
            files[f"{family}_{name}"] = mixed
    for source in DEVELOPMENT:
        files[f"few/{source.name}_few"] = rows(source, "gates", FEW)
        files[f"few/{source.name}_test"] = rows(source, "dev", ASKED)
    for source in HELD_OUT:
        files[f"few/{source.name}_train"] = rows(source, "experts", TRAIN)
        files[f"few/{source.name}_few"] = rows(source, "gates", FEW)
        files[f"few/{source.name}_test"] = rows(source, "test", ASKED)
    return files


def main(config: WorldConfig) -> None:
    """Build the text world."""
    (config.output / "few").mkdir(parents=True, exist_ok=True)
    for name, rows in build(config).items():
        write_rows(config.output / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main(auto_cli(WorldConfig, as_positional=False))
