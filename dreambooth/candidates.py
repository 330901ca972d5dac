"""What `dreambooth.train_lora` is told: LoRAs over one base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dreambooth.class_pictures import PriorConfig
from dreambooth.denoise import DenoiseConfig
from dreambooth.drawing import DrawConfig
from mole_vl.faults import at_least, plain_word, positive, refuse
from mole_vl.training import FitConfig


@dataclass(frozen=True, kw_only=True)
class TextLora:
    """The LoRA of the text encoder, or of SDXL's two.

    Args:
        rank: Rank of each factor pair.
        alpha: The product B A counts alpha / rank times.
        targets: Names of the text encoder's linear layers that get a pair.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __post_init__(self) -> None:
        refuse("TextLora", pair_faults(self.rank, self.alpha, self.targets))


@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """One LoRA, or one for each folder that `data` matches.

    In name, prompt, samples and the prior's settings, `{folder}` stands for the folder's name, and
    `{class}` for what prompts_and_classes.txt beside the folders says of it (see
    `dreambooth.subjects`).

    Args:
        name: Its name, also of its folder.
        data: Folder of its pictures; with metadata.jsonl, or else `prompt`. A pattern such as
            `dreambooth/dataset/*` makes one LoRA of each folder.
        prompt: Caption of all its pictures.
        rank: Rank of each factor pair.
        alpha: The product B A counts alpha / rank times.
        targets: Names of the UNet's linear layers and convolutions that get a pair.
        text_encoder: Whether the text encoder gets a LoRA too, or what kind.
        prior: Prior preservation.
        samples: Prompts that are drawn on the way, each from the same noise every time.
        steps: Optimiser steps; None for the `fit` settings' own.
    """

    name: str
    data: Path
    prompt: str | None = None
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoder: bool | TextLora = False
    prior: PriorConfig | None = None
    samples: tuple[str, ...] = ()
    steps: int | None = None

    def __post_init__(self) -> None:
        refuse(
            f"CandidateConfig {self.name!r}",
            [
                plain_word("name", self.name),
                *pair_faults(self.rank, self.alpha, self.targets),
                at_least("steps", self.steps, 1),
            ],
        )

    @property
    def text(self) -> TextLora | None:
        """The LoRA of the text encoder, if there is one."""
        if isinstance(self.text_encoder, bool):
            return TextLora() if self.text_encoder else None
        return self.text_encoder


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig:
    """LoRAs over one base.

    Args:
        candidates: The LoRAs.
        base: Stable Diffusion 1.x, 2.x or XL in diffusers' format: a folder, or a Hub id.
        output: Where the LoRAs' folders are written, `NAME/unet` each.
        fit: The training loop; each LoRA's run lies in a folder of its name under its `output`.
        denoise: How pictures are shown.
        draw: How samples and class pictures are drawn.
        sample_every: Steps between samples.
        checkpointing: Whether activations are computed again in the backward pass: less memory,
            more time, the same numbers.
        also: Files of the whole LoRA beside the PEFT folders: pytorch_lora_weights.safetensors
            for diffusers, NAME.safetensors in kohya's format.
        dry_run: Check everything, show what it would cost, and train nothing.
    """

    candidates: tuple[CandidateConfig, ...]
    base: str
    output: Path
    fit: FitConfig
    denoise: DenoiseConfig = DenoiseConfig()
    draw: DrawConfig = DrawConfig()
    sample_every: int = 100
    checkpointing: bool = False
    also: tuple[Literal["diffusers", "kohya"], ...] = ()
    dry_run: bool = False

    def __post_init__(self) -> None:
        # Two patterns may both say {folder}: the names that come of it are checked again.
        names = [one.name for one in self.candidates if "{" not in one.name]
        twice = sorted({name for name in names if names.count(name) > 1})
        refuse(
            "CandidatesConfig",
            [
                None if self.candidates else "candidates is empty",
                f"two candidates are called {', '.join(twice)}" if twice else None,
                *self._folder_faults(),
                at_least("sample_every", self.sample_every, 1),
            ],
        )

    def _folder_faults(self) -> list[str]:
        prompts: dict[Path, set[str]] = {}
        for prior in filter(None, (candidate.prior for candidate in self.candidates)):
            prompts.setdefault(prior.pictures, set()).add(prior.prompt)
        return [
            f"{folder} is the class pictures' folder of {' and '.join(map(repr, sorted(found)))}, "
            "expected one for each prompt"
            for folder, found in prompts.items()
            if len(found) > 1
        ]


def pair_faults(rank: int, alpha: float, targets: tuple[str, ...]) -> list[str | None]:
    """What is wrong with the settings of factor pairs."""
    return [
        at_least("rank", rank, 1),
        positive("alpha", alpha),
        None if targets else "targets is empty, expected names of layers",
    ]
