"""How loud each expert is on each task's rows, on a language model (`mole_vl.cross_norms`)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mole_vl import Mixture
from mole_vl.cross_norms import CrossNorms, response_norms
from mole_vl.faults import at_least, refuse
from mole_vl.layers import MixtureLinear
from nlp.data import EncodedRow, to_device
from nlp.forms import Causal, form_of


@torch.no_grad()
def cross_norms(
    mixture: Mixture,
    rows: Mapping[str, Sequence[EncodedRow]],
    *,
    pad: int,
    batch_rows: int = 16,
) -> CrossNorms:
    """Norms of every expert's responses where each expert alone speaks, on its own task's rows.

    Prompts and answers are read; padding is not counted.

    Args:
        mixture: The experts mixed into a causal base, under whatever gates.
        rows: The rows of each expert's task, by the expert's name.
        pad: The id that pads.
        batch_rows: Rows of one forward.

    Raises:
        ValueError: An expert without rows, or rows of no expert; a base that is no causal model;
            layers that are not linear; DoRAs.
    """
    model, names = mixture.model, mixture.names
    layers = {p: own for p, own in mixture.layers.items() if isinstance(own, MixtureLinear)}
    refuse(
        "cross_norms",
        [
            at_least("batch_rows", batch_rows, 1),
            *(f"no rows of {name}" for name in names if not rows.get(name)),
            *(f"rows of {name}, and no such expert" for name in rows if name not in names),
            *(f"{path} is not linear" for path in mixture.layers if path not in layers),
            None if isinstance(form_of(model), Causal) else "the base is no causal model",
        ],
    )
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    for name in names:
        sums: dict[str, Tensor] = {}
        positions = 0
        for start in range(0, len(rows[name]), batch_rows):
            batch = form_of(model).rows(rows[name][start : start + batch_rows], pad)
            batch = to_device(batch, device)
            real = batch["attention_mask"].bool()
            with mixture.pinned({name: 1.0}), _heard(layers, real, sums):
                model(input_ids=batch["input_ids"], attention_mask=real.long(), use_cache=False)
            positions += int(real.sum())
        for path in layers:
            found[path].append(sums[path] / positions)
    return CrossNorms(names, {path: torch.stack(own) for path, own in found.items()})


@contextmanager
def _heard(
    layers: Mapping[str, MixtureLinear], real: Tensor, sums: dict[str, Tensor]
) -> Iterator[None]:
    """Sums of the norms over real positions, added up while the model runs inside."""

    def note(path: str, layer: Any, args: Any) -> None:
        total = response_norms(layer, args[0])[real.to(args[0].device)].sum(0).cpu()
        sums[path] = sums[path] + total if path in sums else total

    hooks = [layer.register_forward_pre_hook(partial(note, path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
