"""How good the world is: what judge-CLIP makes of real and of generated pictures.

One question each time: which of 100 captions fits the picture? The true one stands among 99 of
other pairs of train subjects and base styles, drawn by lot.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import StableDiffusionPipeline
from open_clip import CLIP
from torch import Tensor

from dreambooth.world.captions import plain_caption
from dreambooth.world.pictures import Pictures
from dreambooth.world.scenes import to_float
from dreambooth.world.world import Pair, World

CAPTIONS = 100
STEPS = 25
GUIDANCE = 3.0
_BATCH = 16


class Judge:
    """A CLIP of the world as a judge of pictures."""

    def __init__(self, folder: Path) -> None:
        name = f"local-dir:{folder}"
        loaded: Any = open_clip.create_model_from_pretrained(name)
        self.clip: CLIP = loaded[0].eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    @torch.inference_mode()
    def scores(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines (N, T) of float pictures (N, 3, 64, 64) in [-1, 1] and texts."""
        texts = self.clip.encode_text(self.tokenizer(list(captions)), normalize=True)
        shown = [self.clip.encode_image(some, normalize=True) for some in pictures.split(_BATCH)]
        return torch.cat(shown) @ texts.T


def accuracy(
    judge: Judge, pictures: Tensor, pairs: Sequence[Pair], others: Sequence[Pair], seed: int
) -> dict[str, float]:
    """Shares of pictures whose caption the judge picks: whole, and its subject or style alone.

    The caption of `pairs[i]` stands among 99 of `others`. Style alone: among the captions of the
    same subject in all of the others' styles; subject alone: among 100 subjects in the same style.
    """
    styles = list(dict.fromkeys(pair.style for pair in (*others, *pairs)))
    subjects = list(dict.fromkeys(pair.subject for pair in (*others, *pairs)))
    every = [Pair(subject, style) for subject in subjects for style in styles]
    place = {pair: index for index, pair in enumerate(every)}
    scores = judge.scores(pictures, [plain_caption(pair) for pair in every])
    rng = random.Random(seed)
    hits = {"caption": 0, "subject": 0, "style": 0}
    for row, pair in zip(scores, pairs, strict=True):
        alike = {
            "caption": rng.sample([p for p in others if p != pair], CAPTIONS - 1),
            "subject": [
                Pair(subject, pair.style)
                for subject in rng.sample([s for s in subjects if s != pair.subject], CAPTIONS - 1)
            ],
            "style": [Pair(pair.subject, style) for style in styles if style != pair.style],
        }
        for question, wrong in alike.items():
            best = row[[place[p] for p in wrong]].max()
            hits[question] += int(row[place[pair]] > best)
    return {question: count / len(pairs) for question, count in hits.items()} | {"n": len(pairs)}


def real(pictures: Pictures, pairs: Sequence[Pair]) -> Tensor:
    """The true drawings of pairs, float (N, 3, 64, 64)."""
    return torch.stack([to_float(pictures[pair]) for pair in pairs])


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The base in fp32, quiet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generated(pipeline: Any, captions: Sequence[str], seed: int) -> Tensor:
    """A picture for each caption, float (N, 3, 64, 64) in [-1, 1]; picture i has seed + i."""
    made = []
    for start in range(0, len(captions), _BATCH):
        some = list(captions[start : start + _BATCH])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        drawn = pipeline(
            some,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
        ).images
        made.append(drawn.float().cpu() * 2 - 1)
    return torch.cat(made)


def style_distances(world: World, pictures: Pictures, style: str) -> dict[str, float]:
    """Median over subjects of the mean absolute pixel difference (0 to 1) to each other style."""
    drawn = {s.name: real(pictures, [Pair(u, s) for u in world.subjects]) for s in world.styles}
    return {
        name: round(float((drawn[style] - others).abs().mean((1, 2, 3)).median()) / 2, 4)
        for name, others in drawn.items()
        if name != style
    }
