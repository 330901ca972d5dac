"""What the tests of MoLA on questions share: a base, questions, and what was learned of them."""

import json
import sys

import datasets
import pytest
import torch

from mole_vl.faults import as_messages
from mole_vl.files import read_tensors
from nlp.scienceqa.__main__ import main
from nlp.scienceqa.config import TrainConfig
from nlp.scienceqa.evaluate import EvaluateConfig
from tests.nlp.scienceqa_toys import (
    as_json,
    base,
    pick,
)
from tests.nlp.test_task_moe import wandb as wandb  # a fixture

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, questions, and what was learned of them."""
    folder = tmp_path_factory.mktemp("scienceqa")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    base(folder / "base", width=32)
    (folder / "questions").mkdir()
    for split in SPLITS:
        as_json(folder / f"questions/{split}.json", map(pick, range(12)))
    typed(folder, "prepare", "--dataset", folder / "questions", "--save_path", folder / "sqa")
    typed(
        folder, "train", "--base_model", folder / "base", "--data_path",
        folder / "sqa/science_qa.hf", "--output_dir", folder / "mola", "--batch_size", 12,
        "--micro_batch_size", 12,
        "--num_epochs", 40, "--learning_rate", "1e-2", "--number_experts", "2,4",
        "--lora_r", "4,8", "--lora_dropout", 0, "--val_set_size", 0, "--train_on_inputs", "false",
        "--save_steps", 1000,
    )  # fmt: skip
    yield folder
    patch.undo()


def typed(folder, *arguments):
    """Run a command as it would be typed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["nlp.scienceqa", *map(str, arguments)])
        with as_messages("nlp"):
            main()


def settings(place, folder, **changes):
    """A short training."""
    given = {
        "base_model": str(place / "base"), "data_path": str(place / "sqa/science_qa.hf"),
        "output_dir": folder / "mola", "batch_size": 4, "micro_batch_size": 2, "num_epochs": 1,
        "learning_rate": 1e-2, "number_experts": "2,3", "val_set_size": 0, "lora_dropout": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**given, **changes})


def asking(place, **changes):
    given = {
        "test_dataset": str(place / "sqa/scienceq_test.json"), "base_model": str(place / "base"),
        "mola_weights": place / "mola", "batch_size": 5, "max_new_tokens": 12,
    }  # fmt: skip
    return EvaluateConfig(**{**given, **changes})


def tensors(folder):
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.parent.name} {key}": one for key, one in read_tensors(file).items()}
    return found


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def results(file):
    return json.loads(file.read_text())
