"""The card of the world: figures, grids, and how each was made."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from torchvision.utils import make_grid, save_image

from dreambooth.world.captions import plain_caption, with_article
from dreambooth.world.catalogue import Subject
from dreambooth.world.export import TRAINED
from dreambooth.world.measure import (
    GUIDANCE,
    STEPS,
    Judge,
    accuracy,
    generated,
    load_pipeline,
    real,
    style_distances,
)
from dreambooth.world.models import decode, encode
from dreambooth.world.pictures import Pictures
from dreambooth.world.split import base_pairs, held_out_pairs, open_pairs, unseen_pairs
from dreambooth.world.styles import Style
from dreambooth.world.world import Pair, World

GENERATED = 200
GRID_SUBJECTS = ("guitar", "penguin", "apple", "car", "crown", "whale", "house", "cactus")
TEMPLATE = Path(__file__).with_name("card.md")


def write_card(folder: Path, seed: int) -> None:
    """Measures the world in `folder` and writes `figures.json`, grids and `CARD.md` there."""
    world = World.load(folder)
    pictures = Pictures.load(folder, world)
    trained = base_pairs(world)
    judge = Judge(folder / "judge_clip")
    base = load_pipeline(folder / "base")
    some = random.Random(seed).sample(trained, GENERATED)
    made = generated(base, [plain_caption(pair) for pair in some], seed)
    unseen = unseen_pairs(world)
    figures: dict[str, Any] = {
        "samples": json.loads((folder / "base" / TRAINED).read_text())["samples"],
        "generated": accuracy(judge, made, some, trained, seed),
        "real_unseen": accuracy(judge, real(pictures, unseen), unseen, trained, seed),
        "loss_clip_real_unseen": accuracy(
            Judge(folder / "loss_clip"), real(pictures, unseen), unseen, trained, seed
        ),
        "reconstruction": _reconstruction(base.vae, real(pictures, held_out_pairs(world))),
        "retro_distances": style_distances(world, pictures, "retro"),
        "megabytes": round(_bytes(folder) / 1e6, 1),
    }
    for style in (s for s in world.styles if s.split != "base"):
        own = [pair for pair in held_out_pairs(world) if pair.style == style]
        rivals = [pair for pair in world.pairs() if pair.style.split == style.split]
        rivals += [pair for pair in open_pairs(world) if pair.style.split == "base"]
        figures[f"real_held_out_{style.name}"] = accuracy(
            judge, real(pictures, own), own, rivals, seed
        )
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    _draw_grids(folder, world, pictures, base, seed)
    (folder / "CARD.md").write_text(
        Template(TEMPLATE.read_text()).substitute(_words(figures, world))
    )


@torch.inference_mode()
def _reconstruction(vae: AutoencoderKL, pages: Tensor) -> float:
    """Mean absolute pixel error (0 to 1) of the VAE on pictures that nobody was trained on."""
    drawn = [decode(vae, encode(vae, some).mean) for some in pages.split(16)]
    return round(float((torch.cat(drawn).clamp(-1, 1) - pages).abs().mean()) / 2, 4)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _draw_grids(
    folder: Path, world: World, pictures: Pictures, base: StableDiffusionPipeline, seed: int
) -> None:
    """Generated above real, a row of subjects per base style; and scenes."""
    rows = []
    for style in (s for s in world.styles if s.split == "base"):
        pairs = [Pair(world.subject(name), style) for name in GRID_SUBJECTS]
        rows += [generated(base, [plain_caption(p) for p in pairs], seed), real(pictures, pairs)]
    _save_grid(folder / "generated.png", torch.cat(rows))
    lefts, rights = GRID_SUBJECTS[0::2], GRID_SUBJECTS[1::2]
    scenes = [
        f"{with_article(left)} and {with_article(right)} in {style.name} style"
        for style in world.styles
        if style.split == "base"
        for left, right in zip(lefts, rights, strict=True)
    ]
    _save_grid(folder / "scenes.png", generated(base, scenes, seed), columns=len(lefts))
    held = [
        p for p in held_out_pairs(world) if p.style.split == "test" and p.subject.split == "test"
    ]
    _save_grid(folder / "held_out.png", real(pictures, held), columns=12)


def _save_grid(file: Path, pages: Tensor, columns: int = len(GRID_SUBJECTS)) -> None:
    save_image(make_grid((pages.clamp(-1, 1) + 1) / 2, nrow=columns, padding=2), file)


def _words(figures: dict[str, Any], world: World) -> dict[str, object]:
    def percent(name: str) -> str:
        found = figures[name]
        parts = ", ".join(
            f"{question} {found[question]:.0%}" for question in found if question != "n"
        )
        return f"{parts} (n = {found['n']})"

    def names(split: str, things: Sequence[Subject | Style]) -> str:
        return ", ".join(thing.name for thing in things if thing.split == split)

    distances = figures["retro_distances"]
    return {
        "samples": f"{figures['samples']:,}",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "megabytes": figures["megabytes"],
        "reconstruction": figures["reconstruction"],
        "retro": ", ".join(f"{name} {value:.3f}" for name, value in distances.items()),
        "subjects": len(world.subjects),
        "withheld": len(world.withheld),
        "unseen_pairs": len(unseen_pairs(world)),
        "base_pairs": len(base_pairs(world)),
        "test_subjects": names("test", world.subjects),
        "dev_subjects": names("dev", world.subjects),
        **{name: percent(name) for name, value in figures.items() if _is_accuracy(value)},
    }


def _is_accuracy(value: object) -> bool:
    return isinstance(value, dict) and "caption" in value
