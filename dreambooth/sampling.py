"""Deterministic sampling with guidance, as functions: DDIM (arXiv 2010.02502)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dreambooth.base import Base
from dreambooth.prompts import Prompts

Branches = Callable[[int], Sequence[AbstractContextManager[object]]]
"""For a step of the sampler, the contexts under each of which the network is asked once."""


def one_branch(_step: int) -> Sequence[AbstractContextManager[object]]:
    """Every step as it stands."""
    return [nullcontext()]


def schedule(base: Base, steps: int) -> DDIMScheduler:
    """The base's own noise schedule, sampled by DDIM in `steps` steps."""
    scheduler: Any = DDIMScheduler.from_pretrained(base.name, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    return scheduler


def guided(base: Base, latents: Tensor, step: Tensor, states: Prompts, guidance: float) -> Tensor:
    """The network's output under classifier-free guidance, in one call.

    Args:
        base: Its network may be mixed.
        latents: (rows, c, h, w).
        step: The time step, a scalar.
        states: Encoded prompts, [negative; positive], 2 rows of them.
        guidance: 1 for the positive prompt alone.
    """
    both = base.predict(latents.repeat(2, 1, 1, 1), step, states)
    negative, positive = both.chunk(2)
    return negative + guidance * (positive - negative)


def walk(
    base: Base,
    latents: Tensor,
    states: Prompts,
    scheduler: DDIMScheduler,
    guidance: float,
    span: slice,
    branches: Branches = one_branch,
) -> Tensor:
    """Latents (rows, c, h, w) after some steps of the sampler; keeps the gradient.

    Args:
        base: Its network may be mixed.
        latents: As they stand before the first of the steps.
        states: Encoded prompts, [negative; positive], 2 rows of them.
        scheduler: With its steps set.
        guidance: Strength of guidance.
        span: Which of the scheduler's steps to take.
        branches: The guided outputs of a step's contexts are averaged (LoRA Switch has one context
            a step, Composite one for each LoRA: arXiv 2402.16843).
    """
    for index in range(len(scheduler.timesteps))[span]:
        step = scheduler.timesteps[index]
        outputs = []
        for context in branches(index):
            with context:
                outputs.append(guided(base, latents, step, states, guidance))
        stepped: Any = scheduler.step(torch.stack(outputs).mean(0), int(step), latents)
        latents = stepped.prev_sample
    return latents


@torch.no_grad()
def sample(
    base: Base,
    noise: Tensor,
    states: Prompts,
    scheduler: DDIMScheduler,
    guidance: float,
    upto: int | None = None,
    branches: Branches = one_branch,
) -> Tensor:
    """From noise (rows, c, h, w) to latents after `upto` steps, or all; arguments as of `walk`."""
    latents = noise * scheduler.init_noise_sigma
    return walk(base, latents, states, scheduler, guidance, slice(upto), branches)
