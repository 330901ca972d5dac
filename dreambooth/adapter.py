"""Where diffusers' models are met: their blocks, and the rows of guidance."""

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from mole_vl.sites import blocks_of


def blocks(model: ModelMixin | PreTrainedModel) -> dict[str, int]:
    """Width of each block that the model itself names as repeated, by path.

    A UNet's are its transformer blocks; a text encoder's its layers.
    """
    if isinstance(model, PreTrainedModel):
        width = model.config.get_text_config().hidden_size
        return blocks_of(model, model._no_split_modules or (), lambda _module: width)
    return blocks_of(model, getattr(model, "_repeated_blocks", None) or (), _width)


def _width(module: nn.Module) -> int:
    width = getattr(module, "dim", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(module).__name__} does not say the width that it reads as `dim`")
    return width


def positive_rows(pictures: int, device: torch.device | str = "cpu") -> Tensor:
    """For a batch of guidance, [negative; positive], the row whose gate result each row takes.

    A picture's negative row takes its positive row's, so that guidance compares two prompts under
    the same weights.
    """
    return torch.arange(pictures, 2 * pictures, device=device).repeat(2)
