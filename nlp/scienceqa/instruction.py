"""A sample of an instruction dataset, for training on whole texts before a task is learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mole_vl.faults import at_least, refuse
from nlp.scienceqa.prepare import check_splits_place, save_splits
from nlp.scienceqa.reading import text_of
from nlp.scienceqa.rows import SPLITS, Values
from nlp.tables import check_columns, each, load_table, loading


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw a sample of an instruction dataset in which each of its sources has its share.

    A row's source is what its id has before the first point: flan.123 is of flan.

    Args:
        dataset: A Hub id, a file or a folder with the columns id, question and response.
        num_samples: Rows to learn from.
        validation: Rows of the split validation, none of which is learned from.
        test: Rows of the split test, likewise.
        save_path: The folder that the dataset is written to.
        seed: Of the draw.
    """

    dataset: str = "Open-Orca/OpenOrca"
    num_samples: int = 50000
    validation: int = 1000
    test: int = 1000
    save_path: Path = Path("meta_moe_50k.hf")
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(
            "prepare_instruction",
            [
                None if self.dataset else "dataset is empty, expected a Hub id, a file or a folder",
                at_least("num_samples", self.num_samples, 1),
                at_least("validation", self.validation, 1),
                at_least("test", self.test, 1),
                at_least("seed", self.seed, 0),
            ],
        )


def prepare_instruction(config: SampleConfig) -> None:
    """Draw the rows, put them into texts and write them.

    Raises:
        FileNotFoundError: There is no such dataset.
        ValueError: It cannot be read, lacks a column, has too few rows, or rows without text; what
            stands in `save_path` is no dataset.
    """
    check_splits_place("save_path", config.save_path)
    where = f"dataset: {config.dataset}"
    with loading(where):
        table = load_table(config.dataset)
    check_columns(where, table, ("id", "question", "response"))
    sizes = (config.num_samples, config.validation, config.test)
    if sum(sizes) > len(table):
        raise ValueError(
            f"{where}: num_samples, validation and test are {sum(sizes)} rows together, and it has "
            f"{len(table)}: none is drawn twice"
        )
    with loading(where):
        names = [str(one).partition(".")[0] if "." in str(one) else "" for one in table["id"]]
    parts = stratified(names, sizes, config.seed)
    rows: dict[str, list[Values]] = {}
    for split, places in zip(SPLITS, parts, strict=True):
        picked = table.select(places).select_columns(["question", "response"]).to_list()
        rows[split] = each(where, zip(places, picked, strict=True), _text)
    save_splits(config.save_path, rows)
    counts = ", ".join(f"{len(rows[split])} {split}" for split in SPLITS)
    print(f"{counts}, of {len(set(names))} sources; in {config.save_path}")


def stratified(names: Sequence[str], sizes: Sequence[int], seed: int) -> list[list[int]]:
    """Places drawn without replacement, in parts in which each stratum has its share.

    A stratum's share of a part is right but for rounding (largest remainders, drawn among equals).

    Args:
        names: The stratum of each place.
        sizes: Of the parts; in all no more than there are places.
        seed: Of the draw.

    Returns:
        The places of each part, in rising order.
    """
    draw = np.random.default_rng(seed)
    strata: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        strata.setdefault(name, []).append(place)
    shuffled = [draw.permutation(places) for places in strata.values()]
    left = np.array([len(places) for places in shuffled])
    taken = _shares(left, sum(sizes), draw)
    pools = [places[:count] for places, count in zip(shuffled, taken, strict=True)]
    parts = []
    for size in sizes:
        counts = _shares(np.array([len(pool) for pool in pools]), size, draw)
        picked = [pool[:count] for pool, count in zip(pools, counts, strict=True)]
        pools = [pool[count:] for pool, count in zip(pools, counts, strict=True)]
        parts.append(np.sort(np.concatenate(picked)).tolist())
    return parts


def _shares(weights: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """Whole numbers in the proportion of others, none larger than its own, `size` in all."""
    exact = weights * (size / weights.sum())
    counts = np.floor(exact + 1e-9).astype(int)
    rest = size - int(counts.sum())
    # Among equal remainders the draw decides, not the order.
    order = np.lexsort((draw.random(len(weights)), -(exact - counts)))
    counts[order[:rest]] += 1
    return counts


def _text(values: Mapping[str, Any]) -> Values:
    # Some responses of large collections are empty; the question is a text all the same.
    response = values["response"] or ""
    text = {"output": f"{text_of(values, 'question').strip()}\n{response}".strip()}
    return {"input": None, "instruction": None, "output": text_of(text, "output")}
