"""Training of the VAE: reconstruction of drawings and scenes, with sharp edges and true colours."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth.world.models import LATENT_CHANNELS, decode, encode
from dreambooth.world.scenes import placed, scene, to_float
from mole_vl.training import Row, Term

SCENE_SHARE = 0.25
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5


class VaeTask:
    """Reconstructs `pictures`, uint8 (P, 3, 64, 64): L1 of pixels and edges, a little KL.

    The median that L1 seeks is grey where hues disagree: a term of its own (`hue_weight`) brings
    the colours back once outlines are there.
    """

    def __init__(self, vae: AutoencoderKL, pictures: Tensor, *, hue_weight: float) -> None:
        self.vae: nn.Module = vae
        nn.Module.to(vae, memory_format=torch.channels_last)
        self.pictures = to_float(pictures)
        self.hue_weight = hue_weight

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All parameters of the VAE."""
        return dict(self.vae.named_parameters())

    def place(self, device: torch.device) -> None:
        """Moves the VAE to the device."""
        self.vae.to(device)
        self.device = device

    def batch(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, 64, 64) in [-1, 1] and the noise of the latents' sampling."""
        count = len(self.pictures)
        pages, noises = [], []
        for row in rows:
            generator = row.generator()
            picture = self.pictures[row.pick(count)]
            if torch.rand((), generator=generator) < SCENE_SHARE:
                other = self.pictures[int(torch.randint(count, (), generator=generator))]
                pages.append(scene(picture, other, generator))
            else:
                pages.append(placed(picture, generator))
            side = pages[-1].shape[-1] // 4
            noises.append(torch.randn(LATENT_CHANNELS, side, side, generator=generator))
        return torch.stack(pages).to(self.device), torch.stack(noises).to(self.device)

    def units(self, batch: tuple[Tensor, Tensor]) -> int:
        """One unit a row."""
        return len(batch[0])

    def losses(self, batch: tuple[Tensor, Tensor]) -> Mapping[str, Term]:
        """The terms of the loss for one batch."""
        pages, noise = batch
        pages = pages.contiguous(memory_format=torch.channels_last)
        latents = encode(self.vae, pages)
        drawn = decode(self.vae, latents.mean + latents.std * noise)
        return {
            "pixels": Term(F.l1_loss(drawn, pages)),
            "edges": Term(_edge_difference(drawn, pages), weight=EDGE_WEIGHT),
            "hue": Term(_hue_difference(drawn, pages), weight=self.hue_weight),
            "kl": Term(latents.kl().mean() / latents.mean[0].numel(), weight=KL_WEIGHT),
        }


def _edge_difference(drawn: Tensor, pages: Tensor) -> Tensor:
    """L1 between the differences of neighbouring pixels, along rows and columns."""
    error = drawn - pages
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def _hue_difference(drawn: Tensor, pages: Tensor) -> Tensor:
    """L2 between the differences of red and green, and of blue and green.

    Squared, so that the few vivid pixels outweigh the many grey ones.
    """
    return (drawn - pages).diff(dim=1).square().mean()
