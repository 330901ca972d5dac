"""Builds the emoji world, stage by stage; a stage that was cut off goes on where it stood.

    python -m dreambooth.world.build                    # everything, some four hours on two cores
    python -m dreambooth.world.build --stage base       # one stage
    python -m dreambooth.world.build --stage export     # the base as far as it is trained

Trainings keep their checkpoints under `work`; what is finished goes to `world`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import AutoencoderKL
from jsonargparse import auto_cli
from PIL.Image import Image

from dreambooth.world import models, sources
from dreambooth.world.base_task import BaseTask
from dreambooth.world.card import write_card
from dreambooth.world.catalogue import subjects
from dreambooth.world.clip_task import ClipTask
from dreambooth.world.clips import (
    JUDGE_CLIP,
    LOSS_CLIP,
    ClipSpec,
    make_clip,
    refresh_batch_norms,
    write_clip,
)
from dreambooth.world.export import export_base, export_vae, replace_folder
from dreambooth.world.latents import Latents, make_latents
from dreambooth.world.pictures import Pictures, write_pictures
from dreambooth.world.render import render
from dreambooth.world.split import base_pairs, open_pairs, withheld_drawings
from dreambooth.world.styles import STYLES
from dreambooth.world.tokenizer import make_tokenizer
from dreambooth.world.vae_task import VaeTask
from dreambooth.world.world import Pair, World
from mole_vl.training import FitConfig, fit
from mole_vl.training.rows import rows_of_step

Stage = Literal["pictures", "vae", "latents", "base", "loss-clip", "judge-clip", "export", "card"]
SEED = 0
# Name, steps, learning rate and weight of the hue.
VAE_PHASES = (("outline", 1100, 2e-3, 0.0), ("colour", 650, 2e-3, 4.0))


def build_pictures(folder: Path, work: Path) -> None:
    """Fetches the icon sets, draws every subject in every style, draws the lots of the split."""
    cache = work / "npm"
    sources.fetch(cache)
    known = tuple(subjects(sources.subgroups(cache)))
    world = World(subjects=known, styles=STYLES, withheld=withheld_drawings(known, STYLES, SEED))

    def draw(pair: Pair) -> Image:
        svg = sources.svg(cache, pair.style.icon_set, pair.subject.label)
        return render(svg, pair.style.rendering)

    write_pictures(folder, world, draw)
    world.save(folder)


def build_vae(folder: Path, work: Path) -> None:
    """Trains the VAE on every picture that is not withheld or held out."""
    world = World.load(folder)
    loaded = Pictures.load(folder, world)
    pictures = torch.stack([loaded[pair] for pair in open_pairs(world)])
    torch.manual_seed(SEED)
    vae = models.make_vae()
    for phase, steps, lr, hue_weight in VAE_PHASES:
        config = FitConfig(
            output=work / f"vae-{phase}",
            steps=steps,
            rows=8,
            lr=lr,
            warmup=50,
            ema=0.99,
            seed=SEED,
            save_every=100,
            progress=False,
        )
        fit(VaeTask(vae, pictures, hue_weight=hue_weight), config)
    export_vae(vae, pictures, folder / "base" / "vae")


def build_latents(folder: Path, work: Path) -> None:
    """Encodes the base's pictures once."""
    world = World.load(folder)
    vae = AutoencoderKL.from_pretrained(folder / "base" / "vae", dtype=torch.float32)
    latents = make_latents(vae.eval(), base_pairs(world), Pictures.load(folder, world), SEED)
    latents.save(work / "latents.safetensors")


def build_base(folder: Path, work: Path) -> None:
    """Trains UNet and text encoder together; the longest stage."""
    world = World.load(folder)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(world)
    task = BaseTask(
        unet=models.make_unet(),
        text_encoder=models.make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=models.make_scheduler(),
        latents=Latents.load(work / "latents.safetensors"),
        pairs=base_pairs(world),
    )
    config = FitConfig(
        output=work / "base",
        steps=12000,
        rows=32,
        optimizer="muon",
        lr=8e-4,
        schedule="constant",
        warmup=100,
        weight_decay=0.01,
        ema=0.998,
        seed=SEED,
        save_every=100,
        progress=False,
    )
    fit(task, config)


def build_clip(spec: ClipSpec, folder: Path, work: Path) -> None:
    """Trains one of the CLIPs on every picture that is not withheld or held out."""
    world = World.load(folder)
    loaded, pairs = Pictures.load(folder, world), open_pairs(world)
    torch.manual_seed(spec.seed)
    tokenizer = make_tokenizer(world)
    clip = make_clip(spec, tokenizer)
    pictures = torch.stack([loaded[pair] for pair in pairs])
    task = ClipTask(clip, tokenizer, pairs, pictures, spec.crops)
    config = FitConfig(
        output=work / spec.name,
        steps=spec.steps,
        rows=128,
        lr=2e-3,
        warmup=50,
        weight_decay=0.05,
        ema=0.99,
        seed=spec.seed,
        save_every=50,
        progress=False,
    )
    fit(task, config)
    batches = (task.batch(rows_of_step(spec.seed, config.steps + i, 128)) for i in range(30))
    refresh_batch_norms(clip, (batch.pictures for batch in batches))
    replace_folder(folder / spec.name, partial(write_clip, spec, clip, tokenizer))


def build_export(folder: Path, work: Path) -> None:
    """Writes the base's current average into the world; possible at any time of its training."""
    export_base(World.load(folder), work / "base", folder / "base")


def build_card(folder: Path, work: Path) -> None:
    """Measures what is exported and writes the card with figures and grids."""
    write_card(folder, SEED)


STAGES: dict[Stage, Callable[[Path, Path], None]] = {
    "pictures": build_pictures,
    "vae": build_vae,
    "latents": build_latents,
    "base": build_base,
    "loss-clip": partial(build_clip, LOSS_CLIP),
    "judge-clip": partial(build_clip, JUDGE_CLIP),
    "export": build_export,
    "card": build_card,
}


def build(
    stage: Stage | None = None,
    world: Path = Path("worlds/emoji"),
    work: Path = Path("out/world"),
) -> None:
    """Builds one stage, or all of them in order.

    Args:
        stage: The stage to build; none for all.
        world: The folder of the finished world.
        work: The folder of downloads and checkpoints.
    """
    for name in get_args(Stage) if stage is None else (stage,):
        STAGES[name](world, work)


if __name__ == "__main__":
    auto_cli(build)
