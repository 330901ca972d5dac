"""The denoising task: a base, and what is built into its UNet, learn captioned pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.base import Base
from dreambooth.data import Example, Jitter, load_picture
from dreambooth.frames import Frame, middle_square
from mole_vl.faults import at_least, between, refuse
from mole_vl.training import Row, Term


@dataclass(frozen=True, kw_only=True)
class DenoiseConfig:
    """How pictures are shown.

    Args:
        resolution: Side of the squares that pictures are cut to.
        jitter: Small moves and changes of size.
        caption_dropout: Share of rows shown under the empty prompt, for guidance.
    """

    resolution: int = 512
    jitter: Jitter = Jitter()
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        refuse(
            "DenoiseConfig",
            [
                at_least("resolution", self.resolution, 1),
                between("caption_dropout", self.caption_dropout, 0, 1),
            ],
        )


# Streams of random numbers: the pictures' own, and the class pictures'.
_OWN, _CLASS = 0, 1


@dataclass(frozen=True)
class DenoiseBatch:
    """R = resolution; pictures (B, 3, R, R) in [-1, 1], captions, and all that was drawn.

    `posterior` draws latents from what the VAE gives, `noise` is laid over them, both
    (B, C, h, w); `timesteps` (B,) say how strongly. `frames` are the pictures' sizes and cuts, for
    a base that is told them. The last `prior` of the B are class pictures.
    """

    pictures: Tensor
    captions: Sequence[str]
    posterior: Tensor
    noise: Tensor
    timesteps: Tensor
    frames: Sequence[Frame] | None
    prior: int


@dataclass(frozen=True)
class Prior:
    """Prior preservation (DreamBooth, arXiv 2208.12242, eq. 2): the class is not to change.

    Args:
        examples: Pictures of the class, as the base draws it, under the class's prompt.
        weight: Factor of their loss.
    """

    examples: Sequence[Example]
    weight: float


class DenoiseTask:
    """Predicts the noise, or v, of noised pictures from their captions.

    Args:
        base: The base; `parameters` lie within its UNet and text encoders.
        examples: Pictures and captions.
        parameters: What is trained, by name.
        config: How pictures are shown.
        prior: Class pictures: each row shows one beside its own.

    Raises:
        ValueError: A resolution that does not divide into latents.
    """

    def __init__(
        self,
        base: Base,
        examples: Sequence[Example],
        parameters: Mapping[str, nn.Parameter],
        config: DenoiseConfig,
        prior: Prior | None = None,
    ) -> None:
        base.check_resolution(config.resolution)
        self.base = base
        self.examples = examples
        self.trained = parameters
        self.config = config
        self.prior = prior

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the caller said is trained."""
        return self.trained

    def place(self, device: torch.device) -> None:
        """Move the base; batches follow it."""
        self.base.to(device)
        self.device = device

    def batch(self, rows: Sequence[Row]) -> DenoiseBatch:
        """One example of each row, with a prior one of the class too, and all that is random."""
        shown = [self._shown(row, self.examples, _OWN) for row in rows]
        if self.prior is not None:
            shown += [self._shown(row, self.prior.examples, _CLASS) for row in rows]
        pictures, captions, posteriors, noises, timesteps, frames = zip(*shown, strict=True)
        return DenoiseBatch(
            torch.stack(pictures).to(self.device),
            captions,
            torch.stack(posteriors).to(self.device),
            torch.stack(noises).to(self.device),
            torch.stack(timesteps).to(self.device),
            frames if self.base.sized else None,
            len(rows) if self.prior is not None else 0,
        )

    def _shown(self, row: Row, examples: Sequence[Example], stream: int) -> tuple[Any, ...]:
        """What one row shows, in the order of a batch's fields."""
        shape = self.base.latent_shape(self.config.resolution)
        generator = row.generator(stream)
        example = examples[row.pick(len(examples))]
        picture = load_picture(example.file, self.config.resolution)
        picture = self.config.jitter(picture, generator)
        dropped = torch.rand((), generator=generator) < self.config.caption_dropout
        return (
            picture,
            "" if dropped else example.text,
            torch.randn(shape, generator=generator),
            torch.randn(shape, generator=generator),
            self.base.noising.draw_timestep(generator),
            middle_square(example.file, self.config.resolution) if self.base.sized else None,
        )

    def units(self, batch: DenoiseBatch) -> int:
        """Rows."""
        return len(batch.pictures) - batch.prior

    def losses(self, batch: DenoiseBatch) -> Mapping[str, Term]:
        """Mean squared error of what the UNet predicts: `denoise`, and the class's `prior`."""
        base = self.base
        latents = base.encode(batch.pictures, batch.posterior).float()
        noisy = base.noising.add_noise(latents, batch.noise, batch.timesteps)
        target = base.noising.target(latents, batch.noise, batch.timesteps)
        prompts = base.encode_prompts(batch.captions)
        predicted = base.predict(noisy, batch.timesteps, prompts, batch.frames).float()
        own = self.units(batch)
        terms = {"denoise": Term(F.mse_loss(predicted[:own], target[:own]))}
        if self.prior is not None:
            error = F.mse_loss(predicted[own:], target[own:])
            terms["prior"] = Term(error, self.prior.weight)
        return terms
