"""Write the text world's rows: `python -m nlp.world.build` (10 s).

Every lemma (a word, or a number) lies on one side of the split in all tasks, by a hash of itself:
what one expert has seen is no other's test. Needs lemminflect, num2words and the base's tokenizer.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import auto_cli

from mole_vl.faults import at_least, refuse
from nlp.data import TextRow, write_rows
from nlp.models import BUILT_IN, load_tokenizer
from nlp.world.sources import SOURCES, Source, common_words
from nlp.world.wordings import SIDES, Side

_UPPER = {"experts": 0.60, "gates": 0.75, "dev": 0.83, "test": 1.0}


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How large the text world is.

    Args:
        output: Folder of the JSON-lines files.
        base: The model whose vocabulary says which words are common.
        rows: Rows of one task on each side, at most.
        seed: Seed of the draw of lemmas and wordings.
    """

    output: Path = Path("worlds/text/data")
    base: str = BUILT_IN
    rows: Mapping[Side, int] = field(
        default_factory=lambda: {"experts": 2400, "gates": 240, "dev": 90, "test": 100}
    )
    seed: int = 0

    def __post_init__(self) -> None:
        missing = [side for side in SIDES if side not in self.rows]
        refuse(
            "WorldConfig",
            [
                f"rows lacks {', '.join(missing)}" if missing else None,
                *(at_least(f"rows[{side}]", number, 1) for side, number in self.rows.items()),
            ],
        )


def side_of(lemma: str) -> Side:
    """The side of the split on which a lemma lies, whatever the task."""
    place = int.from_bytes(hashlib.sha256(lemma.encode()).digest()[:8], "big") / 2**64
    return next(side for side in SIDES if place < _UPPER[side])


def rows_of(
    source: Source, side: Side, words: Sequence[str], number: int, seed: int
) -> list[TextRow]:
    """`number` rows of one task and side, or as many as it has.

    Every lemma once, then every lemma again in another wording, and so on.
    """
    answers = {k: v for k, v in source.answers(words).items() if side_of(k) == side}
    wordings = source.wordings[side]
    draw = random.Random(f"{seed} {source.name} {side}")
    lemmas = sorted(answers)
    draw.shuffle(lemmas)
    first = {lemma: draw.randrange(len(wordings)) for lemma in lemmas}
    rows = [
        TextRow(
            wordings[(first[lemma] + turn) % len(wordings)].format(lemma),
            answers[lemma],
            source.name,
        )
        for turn in range(len(wordings))
        for lemma in lemmas
    ]
    return rows[:number]


def build(config: WorldConfig) -> Mapping[str, Sequence[TextRow]]:
    """All rows of the world by the name of their file."""
    words = common_words(load_tokenizer(config.base))
    draw = random.Random(config.seed)
    files: dict[str, Sequence[TextRow]] = {}
    for side in SIDES:
        by_task = {
            source.name: rows_of(source, side, words, config.rows[side], config.seed)
            for source in SOURCES
        }
        if side == "experts":
            files |= {f"{name}_train": rows for name, rows in by_task.items()}
        else:
            mixed = [row for rows in by_task.values() for row in rows]
            draw.shuffle(mixed)
            files[f"mixed_{'train' if side == 'gates' else side}"] = mixed
    return files


def main(config: WorldConfig) -> None:
    """Build the text world."""
    config.output.mkdir(parents=True, exist_ok=True)
    for name, rows in build(config).items():
        write_rows(config.output / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main(auto_cli(WorldConfig, as_positional=False))
