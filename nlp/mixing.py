"""A language model mixed as a gate file says, with what its gates read beside the states."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from mole_vl import Expert, Mixture, mix_from
from mole_vl.gate_file import read_gates
from nlp.adapter import blocks
from nlp.conditioning import features_of_file
from nlp.data import Tokenizer
from nlp.forms import form_of


def mix_by_file(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    experts: Sequence[Expert],
    path: str | Path,
    *,
    allow_changed: bool = False,
    encoder: str | None = None,
) -> Mixture:
    """Mix a language model by the gates in a file.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        experts: Its experts.
        path: The file.
        allow_changed: As for `mole_vl.mix_from`.
        encoder: Where the sentence encoder is that the gates read, if it was moved.

    Raises:
        FileNotFoundError: No gate file there, or the encoder that it names is gone.
        ValueError: What `mix_from` refuses; features that no language model has. The model is left
            as it was.
    """
    features = features_of_file(read_gates(path), model, tokenizer, encoder)
    mixture = mix_from(
        model,
        experts,
        path,
        blocks=blocks(model),
        allow_changed=allow_changed,
        features=features,
        calls=form_of(model).calls,
    )
    if features is not None and encoder is not None:
        # Saved again, the gates name the place where it is now.
        features.name = features.own_name
    return mixture
