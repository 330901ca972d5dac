"""Prompts through a text encoder whose gates weigh LoRAs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dreambooth.base import Base
from dreambooth.prompts import Prompts
from mole_vl import Mixture


@dataclass(frozen=True)
class Unencoded:
    """A negative and a positive prompt that are yet to be encoded: what comes of them changes.

    Args:
        negative: The negative prompt.
        positive: The prompt.
        filled: The places of the experts in the slots of the text encoder's mixture; None for
            gates without slots.
    """

    negative: str
    positive: str
    filled: tuple[int, ...] | None = None


def encode_gated(base: Base, mixture: Mixture, pairs: Sequence[Unencoded]) -> Prompts:
    """Encoded prompts of guidance, [negative; positive], with the weights of the moment.

    A gate over rows pools a prompt's real tokens alone. A negative prompt has gate results of its
    own, as in the pipelines, which encode it apart. Keeps the gradient.

    Args:
        base: Its text encoder is mixed.
        mixture: The text encoder's.
        pairs: The prompts of each picture.
    """
    prompts = [one.negative for one in pairs] + [one.positive for one in pairs]
    places = [one.filled for one in pairs if one.filled is not None]
    filled = torch.tensor(places).repeat(2, 1) if places else None
    with mixture.condition(real=base.readers[0].real(prompts), filled=filled):
        return base.encode_prompts(prompts)
