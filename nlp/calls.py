"""What a call of a language model tells its gates, in loops that know nothing of mixtures."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl.calls import Call
from mole_vl.passes import Masks
from nlp.data import IGNORED


class TextCalls:
    """Reads the arguments that transformers hands a causal model.

    - `attention_mask` tells the padding, of a static cache too.
    - `past_key_values`: forwards that go on from one cache are one answer. Gates over rows read its
      prompt, the first of them, and hold. Without a cache each forward is by itself, and a gate
      over rows reads all that it is shown: `generate(use_cache=False)` wants `nlp.adapter.bound`.
    - `labels` tell prompts in training: the positions that are not scored.
    """

    def __call__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """What a forward with these arguments tells."""
        given = dict(signature(model.forward).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        shown = given.get("input_ids")
        shown = given.get("inputs_embeds") if shown is None else shown
        if not isinstance(shown, Tensor):
            return Call()
        cache = given.get("past_key_values")
        first = cache is None or bool(cache.get_seq_length() == 0)
        real = _real(given.get("attention_mask"), shown, first)
        preview = {
            name: given[name]
            for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
            if given.get(name) is not None
        }
        prompt = _prompt(given.get("labels"), real)
        read = real if prompt is None else prompt
        if read is not None and preview:
            preview["attention_mask"] = read.long()
        return Call(
            masks=Masks(real, prompt),
            thread=cache,
            first=first,
            preview={**preview, "use_cache": False} if first else {},
        )


def _real(mask: Any, shown: Tensor, first: bool) -> Tensor | None:
    """The mask of the positions that this forward runs, the last of all."""
    if isinstance(mask, Mapping):
        # One for each kind of layer; what is padding they agree on.
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4 and first:
        # Of each position, which others it reads (`generate` with a static cache): padding reads
        # nothing, and all else itself.
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return (own if own.dtype == torch.bool else own == 0).expand(shown.shape[:2])
    return mask[:, -shown.shape[1] :].bool() if mask.dim() == 2 else None


def _prompt(labels: Any, real: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    prompt = labels == IGNORED
    return prompt if real is None else prompt & real
