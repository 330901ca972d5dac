"""Where tasks lie in a base's states: centroids for the gates `Nearest`, one for each expert."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl import Mixture
from mole_vl.faults import at_least, refuse
from mole_vl.gates import row_features, take_centroids
from mole_vl.inputs import site_input
from nlp.data import EncodedRow, padded
from nlp.forms import EncoderDecoder, form_of


@torch.no_grad()
def hidden_centroid(
    model: Any,
    rows: Sequence[EncodedRow],
    at: Sequence[str],
    *,
    pad: int,
    batch_rows: int = 16,
) -> dict[str, Tensor]:
    """The mean of what a base makes of some prompts, at some depths: a task's centroid.

    A prompt counts by the direction of the mean over its tokens, as `Nearest` gates read it.

    Args:
        model: The base, without experts: a language model of transformers, unmixed.
        rows: Rows of the task; their answers are not read.
        at: Paths of the modules whose input is meant, such as the model's blocks.
        pad: The id that pads.
        batch_rows: Rows of one forward.

    Returns:
        (d,) by path, in fp32, on the CPU.

    Raises:
        ValueError: No rows, a mixed model, or a module that the model lacks or does not run.
    """
    known = dict(model.named_modules())
    refuse(
        "hidden_centroid",
        [
            None if rows else "there are no rows",
            at_least("batch_rows", batch_rows, 1),
            "the model is mixed: a centroid is of the base without experts; call unmix() first"
            if hasattr(model, "mixture")
            else None,
            *(f"the model has no module {path!r}" for path in at if path not in known),
        ],
    )
    text: Any = model.get_encoder() if isinstance(form_of(model), EncoderDecoder) else model
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    for start in range(0, len(rows), batch_rows):
        # On the right: positions are counted as without padding.
        prompts = [row.prompt for row in rows[start : start + batch_rows]]
        ids, real = (tensor.to(device) for tensor in padded(prompts, pad))
        with _inputs_of({path: known[path] for path in at}) as seen:
            text(input_ids=ids, attention_mask=real.long(), use_cache=False)
        missed = [path for path in at if path not in seen]
        if missed:
            raise ValueError(f"hidden_centroid: {missed[0]} reads nothing when prompts are read")
        for path, x in seen.items():
            total = row_features(x, real.to(x.device)).sum(0).cpu()
            sums[path] = sums[path] + total if path in sums else total
    return {path: total / len(rows) for path, total in sums.items()}


def route_by_centroids(mixture: Mixture, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give a mixture's `Nearest` gates the centroids of its experts.

    Args:
        mixture: The mixture; where its gates read is `site.entry` of each of `mixture.sites`.
        found: By expert, by path: what `hidden_centroid` made of the expert's rows there.

    Raises:
        ValueError: An expert without a centroid where a gate reads, or one of another width.
    """
    gates = {
        site.entry: mixture.gate(name)
        for name, site in mixture.sites.items()
        if site.entry is not None
    }
    take_centroids(gates, mixture.names, found)


@contextmanager
def _inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each module reads first, filled while the model runs inside."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(partial(_note, seen, path), with_kwargs=True)
        for path, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _note(seen: dict[str, Tensor], path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    seen.setdefault(path, site_input(module, args, kwargs, path))
