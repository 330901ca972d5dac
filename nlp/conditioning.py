"""What a language model is asked, as features for its gate: a sentence encoder's view of it.

A gate of site preview reads the states of the model that it routes. Which task a prompt in unheard
words is, an encoder that learned what sentences mean knows other things of: the two together route
better than either.
"""

import re
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl.faults import refuse
from mole_vl.gate_file import GateFile
from mole_vl.gates.scores import unit_sized
from nlp.data import Tokenizer, words_of
from nlp.encoders import Embedder

_WORD = "sentence:"
# The encoder, and the beginning of its weights' hash, which older gate files lack.
_NAME = re.compile(rf"{_WORD}(?P<encoder>.*?)(?:@(?P<digest>[0-9a-f]{{12}}))?")
# Numbers of size 2 beside the states' size 1. Decoupled decay draws all weights alike, and Adam's
# steps are alike, so that what is larger counts more; of 1, 2, 3 and 4 by hand, by wordings left
# out of training.
_SIZE = 2.0


class Sentence:
    """The sentence embedding of what a forward is shown: for site preview, of the prompt.

    Its name tells the encoder and the hash of its weights: by others a gate would choose otherwise.
    A copy is the same: nothing changes it.

    Args:
        encoder: A Hub id, a folder, or all-minilm-l6-v2 (by pip).
        model: The language model that is shown it.
        tokenizer: The model's: its ids are put back into words.

    Raises:
        FileNotFoundError: There is no such encoder.
        ValueError: It is none, or its files lack weights.
    """

    held = True

    def __init__(self, encoder: str, model: nn.Module, tokenizer: Tokenizer) -> None:
        self._embed = Embedder(encoder, setting="encoder")
        # The names of the arguments are those of the class: mixing hooks into the model itself.
        self._kind = type(model)
        self._tokenizer = tokenizer
        self.digest = self._embed.digest()[:12]
        self.own_name = f"{_WORD}{encoder}@{self.digest}"
        self.name = self.own_name
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
        ValueError: It is none, or its files lack weights.
    """
    return None if encoder is None else Sentence(encoder, model, tokenizer)


def features_of_file(
    gates: GateFile, model: nn.Module, tokenizer: Tokenizer, encoder: str | None = None
) -> Sentence | None:
    """The features that a gate file names.

    Args:
        gates: The file.
        model: The language model, not yet mixed.
        tokenizer: Its tokenizer.
        encoder: Where its encoder is now; where the file says if not given.

    Raises:
        FileNotFoundError: Its encoder is gone.
        ValueError: Its encoder has other weights by now; features that no language model has; an
            encoder for gates that read none.
    """
    if gates.features is None:
        refuse(str(gates.source), ["encoder is given, and its gates read none"] if encoder else [])
        return None
    named = _NAME.fullmatch(gates.features)
    if named is None:
        raise ValueError(
            f"{gates.source}: features is {gates.features!r}, expected {_WORD!r} and an encoder: "
            "these gates are of another kind of model"
        )
    try:
        found = Sentence(encoder or named["encoder"], model, tokenizer)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{gates.source}: its gates read the words of each prompt, and the encoder is gone: "
            f"{error}; put it back there (a folder's path counts from where the program runs), or "
            "say by encoder where it is now"
        ) from error
    if named["digest"] not in (None, found.digest):
        raise ValueError(
            f"{gates.source}: its gates were trained with the encoder {named['encoder']!r} of the "
            f"weights {named['digest']}, and {encoder or 'what is there'} has {found.digest}: put "
            "that one back, or train the gates anew"
        )
    found.name = gates.features
    return found
