"""Pictures of prompts, each from noise of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreambooth.base import Base
from dreambooth.prompts import Prompts
from dreambooth.sampling import Branches, one_branch, sample, schedule
from mole_vl.faults import at_least, refuse


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How pictures are drawn, by DDIM.

    Args:
        steps: Sampler steps.
        guidance: Strength of classifier-free guidance; 1 is the prompt alone.
        negative: Negative prompt.
        at_once: Pictures that are drawn together.
    """

    steps: int = 30
    guidance: float = 7.5
    negative: str = ""
    at_once: int = 4

    def __post_init__(self) -> None:
        refuse(
            "DrawConfig",
            [
                at_least("steps", self.steps, 1),
                at_least("guidance", self.guidance, 1),
                at_least("at_once", self.at_once, 1),
            ],
        )


def draw(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], resolution: int, config: DrawConfig
) -> Iterator[Tensor]:
    """Pictures (3, R, R) in [-1, 1], one a prompt, by the base as it stands.

    Args:
        base: Its network may carry LoRAs.
        prompts: What is drawn.
        seeds: Each picture's, of its noise: it is the same whatever is drawn beside it.
        resolution: R.
        config: How.
    """
    for start in range(0, len(prompts), config.at_once):
        part = slice(start, start + config.at_once)
        yield from _together(base, prompts[part], seeds[part], resolution, config)


@torch.no_grad()
def _together(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], resolution: int, config: DrawConfig
) -> Tensor:
    both = base.encode_prompts([config.negative] * len(prompts) + list(prompts))
    return draw_encoded(base, both, seeds, resolution, config.steps, config.guidance)


@torch.no_grad()
def draw_encoded(
    base: Base,
    states: Prompts,
    seeds: Sequence[int],
    resolution: int,
    steps: int,
    guidance: float,
    branches: Branches = one_branch,
) -> Tensor:
    """Pictures (n, 3, R, R) in [-1, 1] of encoded prompts, all drawn together.

    Args:
        base: Its network may carry LoRAs, or be mixed.
        states: Encoded prompts of guidance, [negative; positive], 2n of them.
        seeds: Each picture's, of its noise.
        resolution: R.
        steps: Sampler steps.
        guidance: Strength of guidance.
        branches: As of `dreambooth.sampling.walk`.
    """
    shape, device = base.latent_shape(resolution), base.unet.device
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = sample(
        base,
        torch.stack(noise).to(device),
        states.to(device),
        schedule(base, steps),
        guidance,
        branches=branches,
    )
    return base.decode(latents).float().clamp(-1, 1)
