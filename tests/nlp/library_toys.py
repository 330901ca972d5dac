"""A base, tasks and a private library for the tests, all tiny."""

import sys

from mole_vl.faults import as_messages
from mole_vl.fresh import Form
from mole_vl.lora import LoRA
from mole_vl.program import command
from mole_vl.training import FitConfig
from nlp.data import TextRow
from nlp.private_config import PrivateLibraryConfig
from nlp.private_library import main as train
from nlp.task_library import TaskLibrary
from tests.nlp.toys import tiny_folder

WORDS = {"past": "went", "plural": "oxen", "french": "sept", "german": "neun"}


def rows_of(task, count=3):
    return [TextRow(f"{task} {number}:", WORDS.get(task, task), task) for number in range(count)]


def tasks_at(address, tasks=tuple(WORDS)):
    library = TaskLibrary.open(address, create=True)
    library.add({task: rows_of(task) for task in tasks})
    return library


def private_config(folder, **changes):
    """Settings of a library on disk, its base and its tasks beside it."""
    fit = FitConfig(output=folder / "runs", steps=4, rows=2, lr=0.05, save_every=2, progress=False)
    given = {
        "library": f"local://{folder}/library",
        "data": f"local://{folder}/tasks",
        "fit": fit,
        "lora": LoRA(form=Form(rank=2, alpha=8), targets=("q_proj", "v_proj"), dropout=0.0),
        "base": str(folder / "base"),
    }
    return PrivateLibraryConfig(**given | changes)


def world(folder, tasks=tuple(WORDS)):
    """A base and tasks."""
    tiny_folder(folder / "base")
    tasks_at(f"local://{folder}/tasks", tasks)
    return folder


def shelf(folder, **changes):
    """A trained library."""
    config = private_config(folder, **changes)
    train(config)
    return config


def typed(monkeypatch, component, run, *arguments):
    """Run a program as it is typed."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with as_messages("nlp"):
        run(command(component))
