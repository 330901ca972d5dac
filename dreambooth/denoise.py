"""The denoising task: a base, and what is built into its UNet, learn captioned pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.base import Base
from dreambooth.data import Example, Jitter, load_picture
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


@dataclass(frozen=True)
class DenoiseBatch:
    """R = resolution; pictures (B, 3, R, R) in [-1, 1], captions, and all that was drawn.

    `posterior` draws latents from what the VAE gives, `noise` is laid over them, both
    (B, C, h, w); `timesteps` (B,) say how strongly.
    """

    pictures: Tensor
    captions: Sequence[str]
    posterior: Tensor
    noise: Tensor
    timesteps: Tensor


class DenoiseTask:
    """Predicts the noise, or v, of noised pictures from their captions.

    Args:
        base: The base; `parameters` lie within its UNet.
        examples: Pictures and captions.
        parameters: What is trained, by name.
        config: How pictures are shown.

    Raises:
        ValueError: A resolution that does not divide into latents, a caption that is too long.
    """

    def __init__(
        self,
        base: Base,
        examples: Sequence[Example],
        parameters: Mapping[str, nn.Parameter],
        config: DenoiseConfig,
    ) -> None:
        base.check_resolution(config.resolution)
        self.base = base
        self.examples = examples
        self.trained = parameters
        self.config = config

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the caller said is trained."""
        return self.trained

    def place(self, device: torch.device) -> None:
        """Move the base; batches follow it."""
        self.base.to(device)
        self.device = device

    def batch(self, rows: Sequence[Row]) -> DenoiseBatch:
        """One example of each row, and all that is random about it."""
        shape = self.base.latent_shape(self.config.resolution)
        pictures, captions, posteriors, noises, timesteps = [], [], [], [], []
        for row in rows:
            generator = row.generator()
            example = self.examples[row.pick(len(self.examples))]
            picture = load_picture(example.file, self.config.resolution)
            pictures.append(self.config.jitter(picture, generator))
            dropped = torch.rand((), generator=generator) < self.config.caption_dropout
            captions.append("" if dropped else example.text)
            posteriors.append(torch.randn(shape, generator=generator))
            noises.append(torch.randn(shape, generator=generator))
            timesteps.append(self.base.noising.draw_timestep(generator))
        return DenoiseBatch(
            torch.stack(pictures).to(self.device),
            captions,
            torch.stack(posteriors).to(self.device),
            torch.stack(noises).to(self.device),
            torch.stack(timesteps).to(self.device),
        )

    def units(self, batch: DenoiseBatch) -> int:
        """Rows."""
        return len(batch.pictures)

    def losses(self, batch: DenoiseBatch) -> Mapping[str, Term]:
        """Mean squared error of what the UNet predicts."""
        base = self.base
        latents = base.encode(batch.pictures, batch.posterior).float()
        noisy = base.noising.add_noise(latents, batch.noise, batch.timesteps)
        target = base.noising.target(latents, batch.noise, batch.timesteps)
        states = base.encode_prompts(batch.captions)
        predicted = base.predict(noisy, batch.timesteps, states)
        return {"denoise": Term(F.mse_loss(predicted.float(), target))}
