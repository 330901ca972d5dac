"""LoRAs that change the text encoder too, and domains over them."""

import torch

from dreambooth.base import Base
from dreambooth.clip_task import ClipLoss
from mole_vl import write_peft
from tests.dreambooth.test_clip_task import experts, write_clip
from tests.dreambooth.toys import SIDE, random_expert, write_base, write_examples

NAMES = ("owl", "ink")


def write_text_parts(base, folder, names=NAMES):
    """A part of the text encoder beside the UNet's of each of these LoRAs."""
    encoder = base.text_encoder
    paths = [path for path, _ in encoder.named_modules() if path.endswith(("q_proj", "v_proj"))]
    for name in names:
        write_peft(random_expert(encoder, paths, name, size=0.8), folder / name / "text_encoder")


def given(tmp_path, speaking=NAMES, **settings):
    """The arguments of a SubjectStyle; the LoRAs in `speaking` change the text encoder too."""
    base = Base.load(write_base(tmp_path / "base", "v_prediction"))
    torch.manual_seed(4)
    experts(base.unet, tmp_path / "loras")
    write_text_parts(base, tmp_path / "loras", speaking)
    return {
        "base": base.name,
        "experts": [tmp_path / "loras" / name for name in NAMES],
        "prompt": "owl in ink",
        "negative": "bad",
        "caption": "an owl in ink style",
        "pictures": {name: write_examples(tmp_path / name, ["an owl"] * 2) for name in NAMES},
        "ordinary": write_examples(tmp_path / "ordinary", ["a thing"] * 4),
        "clip": write_clip(tmp_path / "clip"),
        "resolution": SIDE,
        "loss": ClipLoss(steps=3, guidance=2.0, views=1),
        "drawn": 2,
        "text_encoder": True,
        **settings,
    }
