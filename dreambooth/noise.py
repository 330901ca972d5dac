"""How a diffusion base noises its latents, and what its output says about the clean ones.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. The output is eps, or
v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho, arXiv 2202.00512, appendix D).
Latents and all that has their shape are (B, C, H, W), time steps (B,).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mole_vl.faults import one_of, refuse

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Noising:
    """The noise levels of a base and what its output means.

    Args:
        alphas_cumprod: abar_t for each of the T training time steps, (T,), fp32.
        prediction: What the base predicts.
    """

    alphas_cumprod: Tensor
    prediction: Prediction

    def __post_init__(self) -> None:
        silent = self.prediction == "epsilon" and bool((self.alphas_cumprod == 0).any())
        refuse(
            "Noising",
            [
                one_of("prediction", self.prediction, get_args(Prediction)),
                "epsilon says nothing about latents at zero signal: "
                "alphas_cumprod holds 0, expected v_prediction"
                if silent
                else None,
            ],
        )

    @property
    def steps(self) -> int:
        """T: time steps are 0 to T - 1."""
        return len(self.alphas_cumprod)

    def draw_timestep(self, generator: torch.Generator) -> Tensor:
        """One time step, uniform; a scalar."""
        return torch.randint(self.steps, (), generator=generator)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents x_t."""
        signal, spread = self._levels(clean, timesteps)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the base's output should be."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._levels(clean, timesteps)
        return signal * noise - spread * clean

    def clean(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that follow from the base's output at x_t; keeps the gradient."""
        signal, spread = self._levels(noisy, timesteps)
        if self.prediction == "epsilon":
            return (noisy - spread * output) / signal
        return signal * noisy - spread * output

    def _levels(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of signal and noise, (B, 1, 1, 1), with type and device of the latents."""
        level = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return level.sqrt().to(like), (1 - level).sqrt().to(like)
