"""Which task a text belongs to: what the two task classifiers share.

A classifier is a folder: tensors as safetensors, the rest as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_vl.faults import instance_of, refuse, told
from mole_vl.files import check_file, read_object

Kind = Literal["bert", "embedding"]
HEADER = "classifier.json"


@dataclass(frozen=True)
class Labelled:
    """A text and the task that it belongs to."""

    text: str
    task: str


class Classifier(Protocol):
    """Says how probable each task is."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the probabilities."""
        ...

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Of each task for each text, (rows, tasks), in fp32; a text's own, whatever its batch."""
        ...


@dataclass(frozen=True)
class Judged:
    """How a classifier does on held-out rows.

    Args:
        accuracy: Share of the rows whose most probable task is their own.
        log_loss: Mean of -log p of the own task, in nats.
        rows: How many rows.
    """

    accuracy: float
    log_loss: float
    rows: int


def labels_of(examples: Sequence[Labelled], tasks: Sequence[str]) -> Tensor:
    """Each example's place in the list of tasks, (rows,) long.

    Raises:
        ValueError: Fewer than two tasks, a task without an example, or examples of other tasks:
            all of them, each by its number from 0.
    """
    if len(tasks) < 2:
        raise ValueError(
            f"tasks are {', '.join(tasks) or 'none'}: a classifier needs two or more to tell apart"
        )
    seen = {example.task for example in examples}
    strange = [
        f"row {number} is labelled {example.task!r}, expected one of {', '.join(tasks)}"
        for number, example in enumerate(examples)
        if example.task not in tasks
    ]
    empty = [f"no row of the task {task!r}" for task in tasks if task not in seen]
    refuse("classifier", [*told(strange), *empty])
    places = {task: place for place, task in enumerate(tasks)}
    return torch.tensor([places[example.task] for example in examples])


def judge(classifier: Classifier, examples: Sequence[Labelled]) -> Judged:
    """Accuracy and log loss on examples of the classifier's tasks."""
    labels = labels_of(examples, classifier.tasks)
    found = classifier.probabilities([example.text for example in examples])
    return Judged(
        accuracy=float((found.argmax(1) == labels).float().mean()),
        log_loss=float(F.nll_loss(found.clamp_min(1e-12).log(), labels)),
        rows=len(examples),
    )


def hard(probabilities: Tensor) -> Tensor:
    """All of the weight on the most probable task, (rows, tasks); ties to the lower index."""
    return F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).float()


def write_header(folder: Path, kind: Kind, tasks: Sequence[str], **more: object) -> None:
    """Write what a classifier is into its folder."""
    header = {"kind": kind, "tasks": list(tasks), **more}
    text = json.dumps(header, indent=2, ensure_ascii=False) + "\n"
    (folder / HEADER).write_text(text, encoding="utf-8")


def read_header(folder: Path, kind: Kind) -> Mapping[str, Any]:
    """What the classifier in a folder is.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is of the other kind, or damaged.
    """
    file = folder / HEADER
    check_file("classifier", file, f"the header of the {kind} classifier; train it first")
    header = read_object(file)
    tasks = header.get("tasks")
    named = isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)
    refuse(
        str(file),
        [
            None
            if header.get("kind") == kind
            else f"the kind is {header.get('kind')!r}, expected {kind!r}",
            None if named else f"tasks is {tasks!r}, expected names",
            instance_of("encoder", header.get("encoder"), str),
        ],
    )
    return header
