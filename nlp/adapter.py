"""Where transformers is met: a model's blocks, and the rows that its gates are told of."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

from torch import nn
from transformers import PreTrainedModel

from mole_vl import Mixture
from mole_vl.layers import layer_shapes
from mole_vl.losses import Added
from mole_vl.sites import blocks_of
from mole_vl.training import Term
from nlp.around import Around, ExtraTerms
from nlp.data import TextBatch
from nlp.forms import form_of


def blocks(model: PreTrainedModel) -> dict[str, int]:
    """Width of each block that the model itself names as one that must not be split, by path.

    Those of a vision tower are among them; embeddings, which hold no linear layer, are not. A block
    is as wide as its first linear layer reads.
    """
    found = blocks_of(model, model._no_split_modules or (), _width)
    return {path: width for path, width in found.items() if width}


def _width(block: nn.Module) -> int:
    return next((shape[1] for shape in layer_shapes(block).values() if len(shape) == 2), 0)


def bound(mixture: Mixture, added: Added | None = None) -> Around:
    """A language task's seam to a mixture.

    Gates over rows pool the real tokens of the prompt alone and hold for the whole answer, so no
    answer token ever moves the weights that it is predicted with. A preview is shown the prompts
    alone.

    Args:
        mixture: The mixture of the model that runs inside.
        added: What the gates' results add to the loss, such as `mole_vl.losses.balanced(0.1)`.
    """

    @contextmanager
    def around(batch: TextBatch) -> Iterator[ExtraTerms]:
        read = _prompts(batch) if mixture.layout.kind == "preview" else batch
        told = mixture.condition(
            real=read["attention_mask"].bool(),
            pool=read["prompt_mask"],
            seeds=batch.get("seeds"),
            streams=form_of(mixture.model).streams(mixture, batch),
            hold=True,
        )
        with told, mixture.record() as records:
            mixture.preview(**_inputs(mixture.model, read))

            def terms() -> dict[str, Term]:
                found = added(records) if added else {}
                return {
                    name: Term(value, factor, per_unit=False)
                    for name, (value, factor) in found.items()
                }

            yield terms

    return around


def _prompts(batch: TextBatch) -> TextBatch:
    """The columns up to the last one in which a row's prompt still stands, the prompts alone."""
    end = int(batch["prompt_mask"].any(0).nonzero().max()) + 1
    return TextBatch(
        input_ids=batch["input_ids"][:, :end],
        attention_mask=batch["prompt_mask"][:, :end].to(batch["attention_mask"].dtype),
        labels=batch["labels"][:, :end],
        prompt_mask=batch["prompt_mask"][:, :end],
    )


def _inputs(model: nn.Module, batch: TextBatch) -> dict[str, object]:
    """The arguments of a forward that leaves no trace, left padding or right."""
    ids, real = batch["input_ids"], batch["attention_mask"]
    inputs: dict[str, object] = {"input_ids": ids, "attention_mask": real, "use_cache": False}
    if "position_ids" in signature(model.forward).parameters:
        inputs["position_ids"] = (real.cumsum(-1) - 1).clamp_min(0)
    return inputs
