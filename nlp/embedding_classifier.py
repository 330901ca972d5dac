"""A linear head over sentence embeddings that says which task a text belongs to."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mole_vl.faults import refuse
from mole_vl.files import check_file, new_folder, read_tensors
from nlp.classifier import HEADER, Labelled, labels_of, read_header, write_header
from nlp.encoders import Embedder

HEAD = "head.safetensors"
# The inverse of the head's L2 penalty. Embeddings of norm 1 are close to each other: the usual 1.0
# would leave all tasks nearly as probable as one another.
_C = 100.0


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
            save_file({"weight": self.weight, "bias": self.bias}, partial / HEAD)
            write_header(partial, "embedding", self.tasks, encoder=self.embed.name, **about)

    @classmethod
    def load(cls, folder: Path) -> "EmbeddingClassifier":
        """The classifier that `save` wrote.

        Raises:
            FileNotFoundError: There is none, or its encoder is gone.
            ValueError: It is of another kind, or its head does not fit.
        """
        header = read_header(folder, "embedding")
        check_file("classifier", folder / HEAD, "the head of an embedding classifier")
        head = read_tensors(folder / HEAD)
        embed = Embedder(header["encoder"])
        tasks = header["tasks"]
        expected = {"weight": (len(tasks), embed.width), "bias": (len(tasks),)}
        refuse(
            str(folder / HEAD),
            [_odd(name, head.get(name), shape, embed.name) for name, shape in expected.items()],
        )
        return cls(embed, head["weight"], head["bias"], tasks)


def _odd(name: str, tensor: Tensor | None, shape: tuple[int, ...], encoder: str) -> str | None:
    """The fault of one of the head's tensors, or None."""
    if tensor is None:
        return f"{name} is missing"
    if tuple(tensor.shape) != shape:
        return (
            f"{name} is {tuple(tensor.shape)}, expected {shape} for the tasks in {HEADER} and the "
            f"embeddings of {encoder}"
        )
    return None if bool(tensor.isfinite().all()) else f"{name} holds NaN or infinite numbers"


def train_embedding(
    embed: Embedder, examples: Sequence[Labelled], tasks: Sequence[str]
) -> EmbeddingClassifier:
    """Fit the head by multinomial logistic regression with an L2 penalty of the weights.

    The loss is convex: wherever its search begins, it ends at the same head.

    Args:
        embed: Gives the embeddings.
        examples: Texts of the tasks.
        tasks: The tasks.

    Raises:
        ValueError: A label that is no task, or a task without examples.
    """
    labels = labels_of(examples, tasks)
    weight, bias = _fitted(embed([example.text for example in examples]).double(), labels)
    return EmbeddingClassifier(embed, weight.float(), bias.float(), tasks)


def _fitted(vectors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The weight (tasks, width) and bias (tasks,) of least penalised cross-entropy."""
    tasks = int(labels.max()) + 1
    weight = torch.zeros(tasks, vectors.shape[1], dtype=vectors.dtype, requires_grad=True)
    bias = torch.zeros(tasks, dtype=vectors.dtype, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        penalty = weight.square().sum() / (2 * _C * len(labels))
        value = F.cross_entropy(F.linear(vectors, weight, bias), labels) + penalty
        value.backward()
        return value

    search.step(loss)  # pyright: ignore[reportArgumentType] (it says float, and takes tensors)
    return weight.detach(), bias.detach()
