"""The two CLIPs of the world: one that a loss may use, and a judge that no loss ever sees.

import open_clip
name = "local-dir:worlds/emoji/judge_clip"
clip, preprocess = open_clip.create_model_from_pretrained(name)
tokenizer = open_clip.get_tokenizer(name)
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from dreambooth.world.clip_task import Crops
from dreambooth.world.render import SIZE

EMBED_DIM = 96


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """A CLIP of the world: its folder's name, its widths, seed, crops and steps of training."""

    name: str
    width: int
    head_width: int
    text_width: int
    seed: int
    crops: Crops
    steps: int


LOSS_CLIP = ClipSpec(
    name="loss_clip",
    width=16,
    head_width=64,
    text_width=128,
    seed=1,
    crops=Crops(zoom=(0.85, 1.25), shift=0.1, turn=0),
    steps=1600,
)
JUDGE_CLIP = ClipSpec(
    name="judge_clip",
    width=20,
    head_width=64,
    text_width=96,
    seed=2,
    crops=Crops(zoom=(0.7, 1.4), shift=0.2, turn=12),
    steps=2400,
)


def model_config(spec: ClipSpec, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """The model as open_clip's own config has it: a small ResNet beside a small transformer."""
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": [1, 1, 1, 1],
            "width": spec.width,
            "head_width": spec.head_width,
        },
        "text_cfg": {
            "context_length": tokenizer.model_max_length,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": spec.name,  # read from the folder itself
            "width": spec.text_width,
            "heads": 4,
            "layers": 2,
        },
    }


def make_clip(spec: ClipSpec, tokenizer: CLIPTokenizer) -> CLIP:
    """The untrained model."""
    config = model_config(spec, tokenizer)
    return CLIP(
        embed_dim=EMBED_DIM,
        vision_cfg=CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=CLIPTextCfg(**config["text_cfg"]),
    )


@torch.no_grad()
def refresh_batch_norms(clip: CLIP, batches: Iterable[Tensor]) -> None:
    """Takes the batch norms' statistics afresh, for the weights that are kept in the end.

    Weights are averaged over the training and resumed from checkpoints; running statistics are
    neither. Source: Izmailov et al., "Averaging Weights Leads to Wider Optima", 2018, section 3.2.
    """
    norms = [module for module in clip.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    clip.train()
    for pictures in batches:
        clip.encode_image(pictures)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    clip.eval()


def write_clip(spec: ClipSpec, clip: CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes config, weights (fp16) and tokenizer into one folder that open_clip reads."""
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": model_config(spec, tokenizer), "preprocess_cfg": {"size": SIZE, **half}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in clip.state_dict().items()
    }
    save_file(weights, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
