"""The pictures of the base as latents, encoded once: the VAE is frozen while the base learns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from dreambooth.world.models import encode
from dreambooth.world.pictures import Pictures
from dreambooth.world.scenes import placed, scene, to_float
from dreambooth.world.world import Pair

PLACEMENTS = 4
SCENES = 3000
_BATCH = 16


@dataclass(frozen=True)
class Latents:
    """Encoded pictures; P pairs, K placements of each, S scenes; C x H x W is one latent.

    `plain` (P, C, H, W) are the pictures as they are, `moved` (P, K, C, H, W) elsewhere on the
    page, `scenes` (S, C, H, W) two pairs in one style, which `parts` (S, 2) names.
    """

    plain: Tensor
    moved: Tensor
    scenes: Tensor
    parts: Tensor

    def save(self, file: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file(vars(self), partial)
        partial.rename(file)

    @classmethod
    def load(cls, file: Path) -> "Latents":
        """Reads what `save` wrote."""
        return cls(**load_file(file))


def make_latents(
    vae: AutoencoderKL, pairs: Sequence[Pair], pictures: Pictures, seed: int
) -> Latents:
    """Encodes every pair as it is and at `PLACEMENTS` places, and `SCENES` scenes of two pairs."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [to_float(pictures[pair]) for pair in pairs]
    moved = [placed(picture, generator) for picture in drawn for _ in range(PLACEMENTS)]
    parts = _scene_parts(pairs, generator)
    scenes = [scene(drawn[left], drawn[right], generator) for left, right in parts.tolist()]
    encoded = _encode(vae, moved)
    return Latents(
        plain=_encode(vae, drawn),
        moved=encoded.view(len(pairs), PLACEMENTS, *encoded.shape[1:]),
        scenes=_encode(vae, scenes),
        parts=parts,
    )


def _scene_parts(pairs: Sequence[Pair], generator: Generator) -> Tensor:
    """Indices (S, 2) of two different pairs in one style."""
    same_style: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        same_style.setdefault(pair.style.name, []).append(index)
    parts = []
    for _ in range(SCENES):
        first = int(torch.randint(len(pairs), (), generator=generator))
        others = [i for i in same_style[pairs[first].style.name] if i != first]
        parts.append((first, others[int(torch.randint(len(others), (), generator=generator))]))
    return torch.tensor(parts)


@torch.inference_mode()
def _encode(vae: AutoencoderKL, pages: Sequence[Tensor]) -> Tensor:
    """Means of the latents, scaled to about unit variance, fp16 (N, C, H, W)."""
    batches = [torch.stack(list(pages[i : i + _BATCH])) for i in range(0, len(pages), _BATCH)]
    scale = float(vae.config["scaling_factor"])
    means = [encode(vae, batch).mean * scale for batch in batches]
    return torch.cat(means).half().contiguous()
