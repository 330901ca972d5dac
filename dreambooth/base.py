"""The base under the LoRAs: a Stable Diffusion's parts, frozen, and what is asked of them."""

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth.frames import Frame, whole
from dreambooth.noise import Noising
from dreambooth.prompts import Prompts, Reader, read_by_two
from mole_vl.faults import refuse

# What a UNet of SDXL wants beside the prompt's states: its summary, and six numbers of sizes.
_XL = "text_time"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A Stable Diffusion 1.x, 2.x or XL; C latent channels, one for `downscale` squared pixels.

    No part has a gradient of its own; one may flow through them to what is built into `unet` and
    the text encoders.

    Args:
        name: Hub id or folder that it came from.
        unet: Predicts the noise or v of latents (B, C, h, w).
        text_encoder: Token ids (B, L) to states (B, L, D).
        vae: Pictures to latents and back.
        tokenizer: Prompts to token ids.
        noising: Noise levels, and what the UNet predicts.
        text_encoder_2: SDXL's second.
        tokenizer_2: SDXL's second.
    """

    name: str
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    noising: Noising
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None

    def __post_init__(self) -> None:
        channels, latent = self.unet.config["in_channels"], self.vae.config["latent_channels"]
        extra = self.unet.config["addition_embed_type"]
        twice = self.text_encoder_2 is not None and self.tokenizer_2 is not None
        refuse(
            f"the base {self.name}",
            [
                f"its UNet reads {channels} channels and its VAE gives {latent}, expected the same"
                if channels != latent
                else None,
                f"its UNet wants further conditions ({extra!r}), expected a prompt alone, or SDXL's"
                if extra not in (None, _XL)
                else None,
                "its UNet is SDXL's, expected a second text encoder and tokenizer"
                if extra == _XL and not twice
                else None,
                "it has a second text encoder, which its UNet does not read"
                if extra is None and twice
                else None,
                self._numbers_fault() if extra == _XL and twice else None,
            ],
        )
        self._networks().requires_grad_(False).eval()

    def _numbers_fault(self) -> str | None:
        config: Any = self.text_encoder_2.config if self.text_encoder_2 is not None else None
        width = self.unet.config["projection_class_embeddings_input_dim"]
        expected = config.projection_dim + 6 * self.unet.config["addition_time_embed_dim"]
        if width == expected:
            return None
        return (
            f"its UNet reads further conditions of width {width}, expected {expected}: the "
            "prompt's summary and six sizes (SDXL's refiner is no base for LoRAs)"
        )

    @classmethod
    def load(cls, name: str, dtype: torch.dtype = torch.float32) -> "Base":
        """A base in diffusers' format.

        Args:
            name: A folder, or a Hub id.
            dtype: Precision of UNet and text encoders. The VAE is small, and SDXL's overflows in
                fp16: it stays in fp32.

        Raises:
            FileNotFoundError: Neither a folder of that format nor the form of a Hub id.
            ValueError: No base that noises latents and reads prompts by CLIP.
        """
        if not (Path(name) / "model_index.json").exists() and (
            Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        ):
            raise FileNotFoundError(
                f"{name} has no model_index.json: expected a Stable Diffusion in diffusers' "
                "format, a folder or a Hub id"
            )
        scheduler: Any = DDIMScheduler.from_pretrained(name, subfolder="scheduler")
        unet = _part(UNet2DConditionModel, name, "unet", torch_dtype=dtype)
        second: dict[str, Any] = {}
        if unet.config["addition_embed_type"] == _XL:
            second["text_encoder_2"] = _part(
                CLIPTextModelWithProjection, name, "text_encoder_2", dtype=dtype
            )
            second["tokenizer_2"] = _part(CLIPTokenizer, name, "tokenizer_2")
        return cls(
            name=name,
            unet=unet,
            text_encoder=_part(CLIPTextModel, name, "text_encoder", dtype=dtype),
            vae=_part(AutoencoderKL, name, "vae"),
            tokenizer=_part(CLIPTokenizer, name, "tokenizer"),
            noising=Noising(scheduler.alphas_cumprod, scheduler.config.prediction_type),
            **second,
        )

    @property
    def text_encoders(self) -> dict[str, CLIPTextModel | CLIPTextModelWithProjection]:
        """One, or SDXL's two, by component."""
        found: dict[str, Any] = {"text_encoder": self.text_encoder}
        if self.text_encoder_2 is not None:
            found["text_encoder_2"] = self.text_encoder_2
        return found

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The text encoders with their tokenizers: one, or SDXL's two."""
        first = Reader(self.tokenizer, self.text_encoder)
        if self.text_encoder_2 is None or self.tokenizer_2 is None:
            return (first,)
        return first, Reader(self.tokenizer_2, self.text_encoder_2)

    @property
    def sized(self) -> bool:
        """Whether the UNet is told pictures' sizes."""
        return self.text_encoder_2 is not None

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

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Raise ValueError if one has more tokens than the text encoders read."""
        listed = list(prompts)
        for reader in self.readers:
            reader.ids(listed)

    def to(self, device: torch.device) -> None:
        """Move all parts."""
        self._networks().to(device)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """The prompts as the UNet reads them, padded to the tokenizer's fixed length.

        Raises:
            ValueError: Prompts of more tokens than that.
        """
        first, *others = self.readers
        return read_by_two(first, others[0], prompts) if others else Prompts(first.last(prompts))

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1].

        Args:
            pictures: H and W multiples of `downscale`.
            noise: Standard normal, of the latents' shape, for a sample; without it the mean.
        """
        with _no_fp16(pictures.device):
            found = self.vae.encode(pictures.to(self.vae.dtype), return_dict=False)[0]
        latents = found.mean if noise is None else found.mean + found.std * noise.to(found.mean)
        return latents * self.vae.config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, about in [-1, 1], of scaled latents; keeps the gradient."""
        scaled = latents.to(self.vae.dtype) / self.vae.config["scaling_factor"]
        with _no_fp16(latents.device):
            return self.vae.decode(scaled, return_dict=False)[0]

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        prompts: Prompts,
        frames: Sequence[Frame] | None = None,
    ) -> Tensor:
        """The UNet's output at noisy latents (B, C, h, w) under B prompts: the noise, or v.

        Args:
            noisy: Noisy latents.
            timesteps: (B,), or one for all.
            prompts: Encoded prompts.
            frames: Size and cut of each picture, for a base that is `sized`; without them whole
                pictures of the latents' own size.
        """
        added: dict[str, Tensor] | None = None
        if prompts.pooled is not None:
            height, width = (side * self.downscale for side in noisy.shape[-2:])
            frames = frames or [whole(height, width)] * len(noisy)
            # In fp32 whatever the networks' precision: bf16 has no 1023.
            ids = torch.tensor([frame.ids() for frame in frames], dtype=torch.float32)
            added = {"text_embeds": prompts.pooled, "time_ids": ids.to(noisy.device)}
        return self.unet(
            noisy.to(self.unet.dtype), timesteps, prompts.states, added_cond_kwargs=added
        ).sample

    def checkpoint_pictures(self) -> None:
        """Compute the activations of UNet and VAE again in a backward pass, to save memory."""
        self.unet.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def _networks(self) -> nn.ModuleList:
        return nn.ModuleList([self.unet, *self.text_encoders.values(), self.vae])


def _no_fp16(device: torch.device) -> AbstractContextManager[object]:
    # The VAE of SDXL overflows in fp16; in bf16 every one is at home.
    if torch.get_autocast_dtype(device.type) == torch.float16:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _part(kind: Any, name: str, folder: str, **settings: Any) -> Any:
    # The loaders of diffusers and transformers are typed as giving tuples, or anything.
    return kind.from_pretrained(name, subfolder=folder, **settings)
