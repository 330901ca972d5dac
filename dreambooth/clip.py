"""Where open_clip is met: pictures and captions in one space, with gradient for pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import resize

from mole_vl.files import check_file


class Clip(nn.Module):
    """A frozen CLIP.

    Args:
        name: As open_clip reads it: `local-dir:FOLDER`, `hf-hub:ORG/REPO`, or a model's name.
        pretrained: Weights of a model given by name, such as `openai`; None for the other forms.

    Raises:
        FileNotFoundError: A local folder that is none of open_clip's.
        ValueError: A folder without `local-dir:`, or a name without weights.
    """

    def __init__(self, name: str, pretrained: str | None = None) -> None:
        super().__init__()
        _check_name(name, pretrained)
        made: Any = open_clip.create_model(name, pretrained=pretrained)
        self.model = made.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        settings = open_clip.get_model_preprocess_cfg(made)
        self.size = made.visual.image_size
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(settings["std"]).view(3, 1, 1))

    mean: Tensor
    std: Tensor

    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit features (rows, d) of pictures (rows, 3, h, w) in [-1, 1]."""
        size = list(self.size) if isinstance(self.size, tuple) else [self.size, self.size]
        scaled = resize(pictures, size, antialias=True)
        inputs = (scaled * 0.5 + 0.5 - self.mean) / self.std
        return F.normalize(self.model.encode_image(inputs).float(), dim=-1)

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """Unit features (rows, d) of captions."""
        tokens = self.tokenizer(list(captions)).to(self.mean.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


def _check_name(name: str, pretrained: str | None) -> None:
    form, colon, place = name.partition(":")
    if colon and form == "local-dir":
        check_file(f"CLIP {name}", Path(place) / "open_clip_config.json", "a folder of open_clip's")
    elif not colon and Path(name).is_dir():
        raise ValueError(f"CLIP {name} is a folder: write local-dir:{name}")
    elif not colon and pretrained is None:
        raise ValueError(
            f"CLIP {name} says nothing of weights, expected local-dir:FOLDER or hf-hub:ORG/REPO"
        )
