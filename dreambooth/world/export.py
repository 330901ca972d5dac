"""Finished parts on disk, in the formats of diffusers and open_clip: fp16 safetensors."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

from dreambooth.world import models
from dreambooth.world.scenes import to_float
from dreambooth.world.tokenizer import make_tokenizer
from dreambooth.world.world import World
from mole_vl.files import new_folder
from mole_vl.training import read_snapshot

# Beside the pipeline's own files: how long it was trained.
TRAINED = "trained.json"


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a fresh folder beside `folder`, which then takes its place."""
    with new_folder(folder) as partial:
        write(partial)


@torch.inference_mode()
def export_vae(vae: AutoencoderKL, pictures: Tensor, folder: Path) -> None:
    """Writes the VAE with the scaling that gives latents of `pictures` unit variance."""
    vae.eval()
    means = [models.encode(vae, to_float(some)).mean for some in pictures.split(16)]
    vae.register_to_config(scaling_factor=1 / float(torch.cat(means).std()))
    replace_folder(folder, lambda partial: vae.half().save_pretrained(partial))


def export_base(world: World, run: Path, folder: Path) -> None:
    """Writes the pipeline around the averaged weights of the training in `run`.

    Raises:
        ValueError: nothing is trained yet.
    """
    snapshot = read_snapshot(run)
    if snapshot is None:
        raise ValueError(f"no checkpoint of the base under {run}; run the stage base first")
    samples = snapshot.step * int(str(snapshot.settings["rows"]))
    tokenizer = make_tokenizer(world)
    unet, text_encoder = models.make_unet(), models.make_text_encoder(tokenizer)
    unet.load_state_dict(_under("unet.", snapshot.averages))
    text_encoder.load_state_dict(_under("text_encoder.", snapshot.averages))
    assemble: Any = StableDiffusionPipeline
    pipeline = assemble(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=models.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)

    def write(partial: Path) -> None:
        pipeline.save_pretrained(partial)
        # transformers loads a model in the type that it was saved in, diffusers in fp32: in one
        # pipeline they would not meet. Its weights are fp16 all the same.
        config = partial / "text_encoder/config.json"
        said = json.loads(config.read_text()) | {"dtype": "float32"}
        config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        shutil.copytree(folder / "vae", partial / "vae", dirs_exist_ok=True)  # to the bit
        (partial / TRAINED).write_text(json.dumps({"samples": samples}) + "\n")

    replace_folder(folder, write)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
