"""Where diffusers' models are met: their blocks, their paths, and the rows of guidance."""

from typing import Literal

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from mole_vl.experts import Expert
from mole_vl.sites import blocks_of

Negatives = Literal["shared", "own"]
"""Whose gate results a picture's negative row takes: its positive row's, or its own."""

# A UNet registers its middle last, and runs it before its upper half.
_RUN = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


def blocks(model: ModelMixin | PreTrainedModel) -> dict[str, int]:
    """Width of each block that the model itself names as repeated, by path.

    A UNet's are its transformer blocks, in the order they run; a text encoder's its layers.

    Raises:
        ValueError: The model's projections are fused, so that its layers would not be asked.
    """
    if isinstance(model, PreTrainedModel):
        width = model.config.get_text_config().hidden_size
        return blocks_of(model, model._no_split_modules or (), lambda _module: width)
    fused = [
        name
        for name in map(_kind, getattr(model, "attn_processors", {}).values())
        if "Fused" in name
    ]
    if fused:
        raise ValueError(
            f"{type(model).__name__} runs with fused projections ({fused[0]}), which its experts "
            "would not reach: call unfuse_qkv_projections() first"
        )
    found = blocks_of(model, getattr(model, "_repeated_blocks", None) or (), _width)
    return dict(sorted(found.items(), key=lambda item: _RUN.get(item[0].split(".")[0], 0)))


def _kind(thing: object) -> str:
    return type(thing).__name__


def _width(module: nn.Module) -> int:
    width = getattr(module, "dim", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(module).__name__} does not say the width that it reads as `dim`")
    return width


def fitted_to(expert: Expert, model: nn.Module) -> Expert:
    """The expert with its text encoder's paths as this model has them.

    Files write them with and without `text_model.`, and so do versions of transformers. Paths that
    fit, or fit neither way, stay.
    """
    own = {path for path, _ in model.named_modules()}
    renames = {}
    for path in expert.layers.keys() - own:
        bare = path.removeprefix("text_model.")
        other = bare if bare != path else f"text_model.{path}"
        if other in own and other not in expert.layers:
            renames[path] = other
    return expert.renamed(renames) if renames else expert


def positive_rows(pictures: int, device: torch.device | str = "cpu") -> Tensor:
    """For a batch of guidance, [negative; positive], the row whose gate result each row takes.

    A picture's negative row takes its positive row's, so that guidance compares two prompts under
    the same weights.
    """
    return torch.arange(pictures, 2 * pictures, device=device).repeat(2)
