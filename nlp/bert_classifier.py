"""A fine-tuned encoder that says which task a text belongs to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from mole_vl.files import new_folder
from mole_vl.training import FitConfig, Row, Term, Watch, fit
from nlp.classifier import Labelled, labels_of, read_header, write_header
from nlp.encoders import BUILT_IN_ENCODER, Reader, encoder_source, in_batches
from nlp.models import found


class BertClassifier:
    """An encoder with a head over tasks.

    Args:
        model: A sequence classifier of transformers, a label for each task.
        reader: Its tokenizer.
        tasks: The tasks, in the order of its logits.
        encoder: The name of what it was fine-tuned from.
    """

    def __init__(self, model: Any, reader: Reader, tasks: Sequence[str], encoder: str) -> None:
        self.model = model.eval()
        self.reader = reader
        self.tasks = tuple(tasks)
        self.encoder = encoder

    @classmethod
    def fresh(
        cls, tasks: Sequence[str], encoder: str = BUILT_IN_ENCODER, *, seed: int = 0
    ) -> "BertClassifier":
        """A pretrained encoder with a random head.

        Args:
            tasks: The tasks.
            encoder: A Hub id, a folder, or all-minilm-l6-v2 (by pip).
            seed: Seed of the head.

        Raises:
            FileNotFoundError: There is no such encoder.
        """
        source = encoder_source("bert_model", encoder)
        torch.manual_seed(seed)
        with found("bert_model", encoder):
            model = AutoModelForSequenceClassification.from_pretrained(
                source,
                dtype=torch.float32,
                num_labels=len(tasks),
                id2label=dict(enumerate(tasks)),
                label2id={task: place for place, task in enumerate(tasks)},
                problem_type="single_label_classification",
            )
            return cls(model, Reader(source, model.config), tasks, encoder)

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Of each task for each text, (rows, tasks)."""

        def read(batch: Sequence[str]) -> Tensor:
            shown = self.reader(batch, self.model.device)
            return self.model(**shown).logits.float().softmax(-1).cpu()

        return in_batches(texts, 64, read)

    def save(self, folder: Path, **about: object) -> None:
        """Write a folder that transformers reads too; `about` goes into its header."""
        with new_folder(folder) as partial:
            self.model.save_pretrained(partial)
            self.reader.save(partial)
            write_header(partial, "bert", self.tasks, encoder=self.encoder, **about)

    @classmethod
    def load(cls, folder: Path) -> "BertClassifier":
        """The classifier that `save` wrote, on the process's accelerator, if there is one.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is of another kind.
        """
        header = read_header(folder, "bert")
        with found("classifier", str(folder)):
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
            model.to(PartialState().device)
            return cls(model, Reader(folder, model.config), header["tasks"], header["encoder"])


class ClassifierTask:
    """Teach a sequence classifier the tasks of texts; the loss is a mean over rows.

    Args:
        classifier: All of it is trained.
        examples: Texts of its tasks.
    """

    def __init__(self, classifier: BertClassifier, examples: Sequence[Labelled]) -> None:
        self._classifier = classifier
        self._texts = [example.text for example in examples]
        self._labels = labels_of(examples, classifier.tasks)
        self._device = torch.device("cpu")

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Encoder and head."""
        return dict(self._classifier.model.named_parameters())

    def place(self, device: torch.device) -> None:
        """Move the model; batches follow it."""
        self._device = device
        self._classifier.model.to(device)

    def batch(self, rows: Sequence[Row]) -> tuple[Mapping[str, Tensor], Tensor]:
        """The epoch's next texts, with their labels."""
        places = [row.pick(len(self._texts)) for row in rows]
        shown = self._classifier.reader([self._texts[place] for place in places], self._device)
        return shown, self._labels[places].to(self._device)

    def units(self, batch: tuple[Mapping[str, Tensor], Tensor]) -> int:
        """Rows."""
        return len(batch[1])

    def losses(self, batch: tuple[Mapping[str, Tensor], Tensor]) -> Mapping[str, Term]:
        """The term `task`, in nats a row."""
        shown, labels = batch
        logits = self._classifier.model(**shown).logits
        return {"task": Term(F.cross_entropy(logits.float(), labels))}


def train_bert(
    classifier: BertClassifier,
    examples: Sequence[Labelled],
    run: FitConfig,
    lesson: Mapping[str, object],
    watch: Watch | None = None,
) -> None:
    """Fine-tune a classifier.

    Args:
        classifier: As `BertClassifier.fresh` gives it; in eval mode afterwards.
        examples: Texts of its tasks.
        run: The training loop.
        lesson: What decides the weights beside the loop's own settings.
        watch: As for `fit`.

    Raises:
        ValueError: A label that is no task, or a task without examples.
    """
    task = ClassifierTask(classifier, examples)
    classifier.model.train()
    fit(task, run, lesson, watch)
    classifier.model.eval()
