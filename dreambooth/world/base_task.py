"""Training of the base: UNet and text encoder together, v-prediction on latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.world.captions import caption, dropped, scene_caption
from dreambooth.world.latents import Latents
from dreambooth.world.world import Pair
from mole_vl.training import Row, Term

SCENE_SHARE = 0.1
PLAIN_SHARE = 0.75


@dataclass(frozen=True)
class Batch:
    """Clean latents and noise (B, C, H, W), time steps (B,), token ids (B, L)."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    tokens: Tensor


class BaseTask:
    """Predicts v of noised `latents` from their captions; `pairs` names the latents' rows."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        latents: Latents,
        pairs: Sequence[Pair],
    ) -> None:
        self.networks = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).train()
        self.tokenizer = tokenizer
        self.scheduler: Any = scheduler
        self.latents = latents
        self.pairs = pairs

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All parameters of both networks."""
        return dict(self.networks.named_parameters())

    def place(self, device: torch.device) -> None:
        """Moves both networks to the device."""
        self.networks.to(device)
        self.device = device

    def batch(self, rows: Sequence[Row]) -> Batch:
        """One example, noise and time step for each row."""
        latents, noises, timesteps, captions = [], [], [], []
        for row in rows:
            generator = row.generator()
            latent, text = self._example(row, generator)
            latents.append(latent.float())
            captions.append(dropped(text, generator))
            noises.append(torch.randn(latent.shape, generator=generator))
            steps = self.scheduler.config["num_train_timesteps"]
            timesteps.append(torch.randint(steps, (), generator=generator))
        tokens = self.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        device = self.device
        return Batch(
            torch.stack(latents).to(device),
            torch.stack(noises).to(device),
            torch.stack(timesteps).to(device),
            tokens.to(device),
        )

    def _example(self, row: Row, generator: Generator) -> tuple[Tensor, str]:
        index = row.pick(len(self.pairs))
        kind = float(torch.rand((), generator=generator))
        if kind < SCENE_SHARE:
            number = int(torch.randint(len(self.latents.scenes), (), generator=generator))
            left, right = (self.pairs[i] for i in self.latents.parts[number].tolist())
            return self.latents.scenes[number], scene_caption(left, right, generator)
        text = caption(self.pairs[index], generator)
        if kind < SCENE_SHARE + (1 - SCENE_SHARE) * PLAIN_SHARE:
            return self.latents.plain[index], text
        place = int(torch.randint(self.latents.moved.shape[1], (), generator=generator))
        return self.latents.moved[index, place], text

    def units(self, batch: Batch) -> int:
        """One unit a row."""
        return len(batch.latents)

    def losses(self, batch: Batch) -> Mapping[str, Term]:
        """The terms of the loss for one batch."""
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        states = self.networks["text_encoder"](batch.tokens).last_hidden_state
        # On a CPU the fused kernel's backward, at 16 and 64 positions, costs a fifth of the step.
        with sdpa_kernel(SDPBackend.MATH):
            predicted = self.networks["unet"](noisy, batch.timesteps, states).sample
        return {"v": Term(F.mse_loss(predicted, target))}
