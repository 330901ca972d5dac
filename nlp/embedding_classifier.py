"""A linear head over sentence embeddings that says which task a text belongs to."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from mole_vl.files import check_file, new_folder
from nlp.classifier import HEADER, Labelled, labels_of, read_header, write_header
from nlp.encoders import BUILT_IN_ENCODER, Reader, encoder_source, in_batches
from nlp.models import found

_HEAD = "head.safetensors"
_FITTING = "sklearn"
# The inverse of the head's L2 penalty. Embeddings of norm 1 are close to each other: scikit-learn's
# own 1.0 would leave all tasks nearly as probable as one another.
_C = 100.0


class Embedder:
    """Sentence embeddings: an encoder's last states, mean over real tokens, L2-normalised.

    That is what sentence-transformers makes of all-MiniLM-L6-v2 (Reimers and Gurevych 2019). The
    encoder runs on the process's accelerator, if there is one; embeddings are on the CPU.

    Args:
        encoder: A Hub id, a folder, or all-minilm-l6-v2 (by pip).

    Raises:
        FileNotFoundError: There is no such encoder.
    """

    def __init__(self, encoder: str = BUILT_IN_ENCODER) -> None:
        self.name = encoder
        source = encoder_source("embedding_model", encoder)
        with found("embedding_model", encoder):
            self._model: Any = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
            self._model.to(PartialState().device)
            self._reader = Reader(source, self._model.config)
        self.width: int = self._model.config.hidden_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (rows, width) of norm 1, in fp32."""

        def read(batch: Sequence[str]) -> Tensor:
            shown = self._reader(batch, self._model.device)
            states = self._model(**shown).last_hidden_state
            real = shown["attention_mask"].unsqueeze(-1)
            return F.normalize((states * real).sum(1) / real.sum(1), dim=-1).cpu()

        return in_batches(texts, 64, read)


class EmbeddingClassifier:
    """Softmax of a linear map of sentence embeddings.

    Args:
        embed: Gives the embeddings.
        weight: (tasks, width).
        bias: (tasks,).
        tasks: The tasks, in this order.
    """

    def __init__(self, embed: Embedder, weight: Tensor, bias: Tensor, tasks: Sequence[str]) -> None:
        self.embed = embed
        self.weight = weight
        self.bias = bias
        self.tasks = tuple(tasks)

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Of each task for each text, (rows, tasks)."""
        return F.linear(self.embed(texts), self.weight, self.bias).softmax(-1)

    def save(self, folder: Path, **about: object) -> None:
        """Write the head, and the encoder's name; `about` goes into the header too."""
        with new_folder(folder) as partial:
            save_file({"weight": self.weight, "bias": self.bias}, partial / _HEAD)
            write_header(partial, "embedding", self.tasks, encoder=self.embed.name, **about)

    @classmethod
    def load(cls, folder: Path) -> "EmbeddingClassifier":
        """The classifier that `save` wrote.

        Raises:
            FileNotFoundError: There is none, or its encoder is gone.
            ValueError: It is of another kind, or its head does not fit.
        """
        header = read_header(folder, "embedding")
        check_file("classifier", folder / _HEAD, "the head of an embedding classifier")
        head = load_file(folder / _HEAD)
        embed = Embedder(header["encoder"])
        expected = (len(header["tasks"]), embed.width)
        if tuple(head["weight"].shape) != expected:
            raise ValueError(
                f"{folder / _HEAD}: weight is {tuple(head['weight'].shape)}, expected {expected} "
                f"for the tasks in {HEADER} and the embeddings of {embed.name}"
            )
        return cls(embed, head["weight"], head["bias"], header["tasks"])


def check_fitting() -> None:
    """Raise ValueError unless the package that fits heads is installed."""
    if find_spec(_FITTING) is None:
        raise ValueError(
            "embedding_classifier needs the package scikit-learn to be trained: "
            "pip install 'mole-vl[classifier]'"
        )


def train_embedding(
    embed: Embedder, examples: Sequence[Labelled], tasks: Sequence[str]
) -> EmbeddingClassifier:
    """Fit the head by multinomial logistic regression.

    Args:
        embed: Gives the embeddings.
        examples: Texts of the tasks.
        tasks: The tasks.

    Raises:
        ValueError: A label that is no task, a task without examples, or no scikit-learn.
    """
    check_fitting()
    labels = labels_of(examples, tasks)
    vectors = embed([example.text for example in examples])
    # An extra that answering does without: it comes in for those who train.
    linear = import_module(f"{_FITTING}.linear_model")
    fitted = linear.LogisticRegression(C=_C, max_iter=1000).fit(vectors.numpy(), labels.numpy())
    weight, bias = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if len(tasks) == 2:
        # scikit-learn gives the log-odds of the second task alone.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return EmbeddingClassifier(embed, weight.float().contiguous(), bias.float(), tasks)
