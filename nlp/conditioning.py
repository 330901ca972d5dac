"""What a language model is asked, as features for its gate: a sentence encoder's view of it.

A gate of site preview reads the states of the model that it routes. Which task a prompt in unheard
words is, an encoder that learned what sentences mean knows other things of: the two together route
better than either.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl.gate_file import GateFile
from mole_vl.gates.scores import unit_sized
from nlp.data import Tokenizer, words_of
from nlp.encoders import Embedder

_WORD = "sentence:"
# Numbers of size 2 beside the states' size 1. Decoupled decay draws all weights alike, and Adam's
# steps are alike, so that what is larger counts more; of 1, 2, 3 and 4 by hand, by wordings left
# out of training.
_SIZE = 2.0


class Sentence:
    """The sentence embedding of what a forward is shown: for site preview, of the prompt.

    A copy is the same: nothing changes it.

    Args:
        encoder: A Hub id, a folder, or all-minilm-l6-v2 (by pip).
        model: The language model that is shown it.
        tokenizer: The model's: its ids are put back into words.

    Raises:
        FileNotFoundError: There is no such encoder.
    """

    held = True

    def __init__(self, encoder: str, model: nn.Module, tokenizer: Tokenizer) -> None:
        self._embed = Embedder(encoder, setting="encoder")
        # The names of the arguments are those of the class: mixing hooks into the model itself.
        self._kind = type(model)
        self._tokenizer = tokenizer
        self.name = f"{_WORD}{encoder}"
        self.width = self._embed.width

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sentence":
        return self

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The features (rows, width) of a forward: of the ids that its mask shows.

        Raises:
            ValueError: The model is shown no ids.
        """
        given = signature(self._kind.forward).bind_partial(None, *args, **kwargs).arguments
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise ValueError(
                f"the gate reads the words of each prompt ({self.name}), and this forward is "
                "shown no input_ids: show them, or take gates that read no sentence"
            )
        shown = torch.ones_like(ids) if mask is None else mask
        texts = words_of(ids, shown, self._tokenizer)
        # As alone: the model's own precision is none of the encoder's.
        with torch.autocast(ids.device.type, enabled=False):
            return unit_sized(self._embed(texts)) * _SIZE


def sentence(encoder: str | None, model: nn.Module, tokenizer: Tokenizer) -> Sentence | None:
    """What a gate beside `model` reads of prompts by an encoder; None for no encoder.

    Raises:
        FileNotFoundError: There is no such encoder.
    """
    return None if encoder is None else Sentence(encoder, model, tokenizer)


def features_of_file(gates: GateFile, model: nn.Module, tokenizer: Tokenizer) -> Sentence | None:
    """The features that a gate file names.

    Raises:
        FileNotFoundError: Its encoder is gone.
        ValueError: Features that no language model has.
    """
    if gates.features is None:
        return None
    if not gates.features.startswith(_WORD):
        raise ValueError(
            f"{gates.source}: features is {gates.features!r}, expected {_WORD!r} and an encoder: "
            "these gates are of another kind of model"
        )
    return sentence(gates.features.removeprefix(_WORD), model, tokenizer)
