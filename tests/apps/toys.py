"""A tiny base with two LoRAs and their pictures, for the parts of the page."""

from dataclasses import dataclass
from pathlib import Path

import torch

from apps.album import Album
from apps.preset import Preset
from apps.session import Session
from apps.shelf import Shelf
from apps.studio import Studio, load_pipeline
from apps.training import Trainer
from dreambooth.base import Base
from dreambooth.clip_task import ClipLoss
from dreambooth.subject_style import SubjectStyle
from mole_vl.gates import Free, MoLE, Sigmoid
from mole_vl.training import FitConfig
from tests.dreambooth.test_clip_task import experts, write_clip
from tests.dreambooth.toys import SIDE, write_base, write_examples

PROMPT = "owl in ink"


@dataclass(frozen=True)
class Toy:
    """All that a page stands on."""

    studio: Studio
    shelf: Shelf
    trainer: Trainer
    session: Session
    root: Path

    @property
    def loras(self):
        return self.session.chosen(["owl", "ink"], self.shelf)


def toy(root: Path) -> Toy:
    base = write_base(root / "base", "v_prediction")
    torch.manual_seed(5)
    experts(Base.load(base).unet, root / "loras")
    preset = Preset(
        domain=SubjectStyle(
            base="another",
            experts=[],
            prompt="p",
            caption="c",
            pictures={
                "owl": write_examples(root / "owl", ["an owl"] * 2),
                "ink": write_examples(root / "ink", ["a dog"] * 3),
            },
            ordinary=write_examples(root / "ordinary", ["a thing"] * 4),
            clip=write_clip(root / "clip"),
            resolution=SIDE,
            loss=ClipLoss(steps=2, guidance=2.0),
            steps=2,
        ),
        fit=FitConfig(output=root / "unused", steps=4, rows=2, lr=0.1, save_every=2),
        gate=MoLE(score=Free(), normaliser=Sigmoid()),
    )
    folders = {**preset.domain.picture_folders, "ordinary pictures": preset.domain.ordinary_folder}
    studio = Studio(load_pipeline(base), preset.gate, preset.site)
    return Toy(
        studio,
        Shelf(root / "loras", root / "scratch", studio.unet_config),
        Trainer(base, preset, Album(folders, root, root / "album")),
        Session(root / "session"),
        root,
    )
