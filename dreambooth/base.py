"""The base under the LoRAs: a Stable Diffusion's parts, frozen, and what is asked of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.noise import Noising
from mole_vl.faults import refuse


@dataclass(frozen=True, kw_only=True)
class Base:
    """A Stable Diffusion 1.x or 2.x; C latent channels, one latent for `downscale` squared pixels.

    No part has a gradient of its own; one may flow through them to what is built into `unet`.

    Args:
        name: Hub id or folder that it came from.
        unet: Predicts the noise or v of latents (B, C, h, w).
        text_encoder: Token ids (B, L) to states (B, L, D).
        vae: Pictures to latents and back.
        tokenizer: Prompts to token ids.
        noising: Noise levels, and what the UNet predicts.
    """

    name: str
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    noising: Noising

    def __post_init__(self) -> None:
        channels, latent = self.unet.config["in_channels"], self.vae.config["latent_channels"]
        extra = self.unet.config["addition_embed_type"]
        refuse(
            f"the base {self.name}",
            [
                f"its UNet reads {channels} channels and its VAE gives {latent}, expected the same"
                if channels != latent
                else None,
                f"its UNet wants further conditions ({extra!r}), expected a prompt alone"
                if extra is not None
                else None,
            ],
        )
        self._networks().requires_grad_(False).eval()

    @classmethod
    def load(cls, name: str, dtype: torch.dtype = torch.float32) -> "Base":
        """A base in diffusers' format.

        Args:
            name: A folder, or a Hub id.
            dtype: Precision of the weights.

        Raises:
            FileNotFoundError: Neither a folder of that format nor the form of a Hub id.
            ValueError: No base that noises latents and reads one prompt.
        """
        if not (Path(name) / "model_index.json").exists() and (
            Path(name).exists() or name.count("/") != 1
        ):
            raise FileNotFoundError(
                f"{name} has no model_index.json: expected a Stable Diffusion in diffusers' "
                "format, a folder or a Hub id"
            )
        scheduler: Any = DDIMScheduler.from_pretrained(name, subfolder="scheduler")
        return cls(
            name=name,
            unet=_part(UNet2DConditionModel, name, "unet", torch_dtype=dtype),
            text_encoder=_part(CLIPTextModel, name, "text_encoder", dtype=dtype),
            vae=_part(AutoencoderKL, name, "vae", torch_dtype=dtype),
            tokenizer=_part(CLIPTokenizer, name, "tokenizer"),
            noising=Noising(scheduler.alphas_cumprod, scheduler.config.prediction_type),
        )

    @property
    def downscale(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def check_resolution(self, resolution: int) -> None:
        """Raise ValueError unless pictures of this side divide into latents."""
        if resolution < 1 or resolution % self.downscale:
            raise ValueError(
                f"resolution is {resolution}, expected a multiple of {self.downscale}: the pixels "
                f"along one latent of {self.name}"
            )

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """C, h, w of a square picture's latents."""
        side = resolution // self.downscale
        return self.vae.config["latent_channels"], side, side

    def to(self, device: torch.device) -> None:
        """Move all parts."""
        self._networks().to(device)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """States of the prompts, (B, L, D), L being the tokenizer's fixed length.

        Raises:
            ValueError: Prompts of more than L tokens.
        """
        ids = self.tokenizer(list(prompts)).input_ids
        length = self.tokenizer.model_max_length
        refuse(
            "encode_prompts",
            [
                f"{prompt!r} has {len(row)} tokens, expected at most {length}"
                for prompt, row in zip(prompts, ids, strict=True)
                if len(row) > length
            ],
        )
        padded = self.tokenizer.pad(
            {"input_ids": ids}, padding="max_length", max_length=length, return_tensors="pt"
        )
        return self.text_encoder(padded["input_ids"].to(self.text_encoder.device)).last_hidden_state

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1].

        Args:
            pictures: H and W multiples of `downscale`.
            noise: Standard normal, of the latents' shape, for a sample; without it the mean.
        """
        found = self.vae.encode(pictures.to(self.vae.dtype), return_dict=False)[0]
        latents = found.mean if noise is None else found.mean + found.std * noise.to(found.mean)
        return latents * self.vae.config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, about in [-1, 1], of scaled latents; keeps the gradient."""
        scaled = latents.to(self.vae.dtype) / self.vae.config["scaling_factor"]
        return self.vae.decode(scaled, return_dict=False)[0]

    def predict(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """The UNet's output at noisy latents under prompt states: the noise, or v."""
        return self.unet(noisy.to(self.unet.dtype), timesteps, states).sample

    def _networks(self) -> nn.ModuleList:
        return nn.ModuleList([self.unet, self.text_encoder, self.vae])


def _part(kind: Any, name: str, folder: str, **settings: Any) -> Any:
    # The loaders of diffusers and transformers are typed as giving tuples, or anything.
    return kind.from_pretrained(name, subfolder=folder, **settings)
