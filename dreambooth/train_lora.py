"""Train DreamBooth LoRAs over one base and write each as a component folder of PEFT's format.

    accelerate launch -m dreambooth.train_lora --config configs/emoji_loras.yaml

Stopped at any moment it goes on where it was; LoRAs whose folder stands are not trained again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from jsonargparse import auto_cli
from peft import LoraConfig, get_peft_model

from dreambooth.base import Base
from dreambooth.data import Example, read_examples
from dreambooth.denoise import DenoiseConfig, DenoiseTask
from mole_vl import trained_expert, write_peft
from mole_vl.faults import as_messages, at_least, plain_word, refuse
from mole_vl.files import new_folder
from mole_vl.targets import check_targets
from mole_vl.training import FitConfig, FitResult, fit


@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """One LoRA.

    Args:
        name: Its name, also of its folder.
        data: Folder of its pictures; with metadata.jsonl, or else `prompt`.
        prompt: Caption of all its pictures.
        rank: Rank of each factor pair.
        alpha: The product B A counts alpha / rank times.
        targets: Names of the UNet's linear layers that get a pair.
        steps: Optimiser steps; None for the `fit` settings' own.
    """

    name: str
    data: Path
    prompt: str | None = None
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    steps: int | None = None

    def __post_init__(self) -> None:
        refuse(
            f"CandidateConfig {self.name!r}",
            [
                plain_word("name", self.name),
                at_least("rank", self.rank, 1),
                None if self.alpha > 0 else f"alpha is {self.alpha}, expected a positive number",
                None if self.targets else "targets is empty, expected names of linear layers",
                at_least("steps", self.steps, 1),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig:
    """LoRAs over one base.

    Args:
        candidates: The LoRAs.
        base: Stable Diffusion in diffusers' format: a folder, or a Hub id.
        output: Where the LoRAs' folders are written, `NAME/unet` each.
        fit: The training loop; each LoRA's run lies in a folder of its name under its `output`.
        denoise: How pictures are shown.
    """

    candidates: tuple[CandidateConfig, ...]
    base: str
    output: Path
    fit: FitConfig
    denoise: DenoiseConfig = DenoiseConfig()

    def __post_init__(self) -> None:
        names = [candidate.name for candidate in self.candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        refuse(
            "CandidatesConfig",
            [
                None if names else "candidates is empty",
                f"two candidates are called {', '.join(twice)}" if twice else None,
            ],
        )


def train_candidate(
    base: Base, examples: Sequence[Example], candidate: CandidateConfig, config: CandidatesConfig
) -> FitResult:
    """Train one LoRA on `base`, write its folder, and leave `base` as it was.

    Raises:
        ValueError: A target that names no layer of the UNet, or one that is not linear.
    """
    run = replace(
        config.fit,
        output=config.fit.output / candidate.name,
        steps=candidate.steps or config.fit.steps,
    )
    check_targets(base.unet, candidate.name, candidate.targets)
    set_seed(run.seed)
    lora = LoraConfig(
        r=candidate.rank,
        lora_alpha=candidate.alpha,  # pyright: ignore[reportArgumentType] (peft divides it, no more)
        target_modules=list(candidate.targets),
    )
    adapted = get_peft_model(base.unet, lora)  # pyright: ignore[reportArgumentType] (any module)
    try:
        trained = {name: p for name, p in base.unet.named_parameters() if p.requires_grad}
        result = fit(DenoiseTask(base, examples, trained, config.denoise), run, asdict(candidate))
        if PartialState().is_main_process:
            expert = trained_expert(adapted.get_base_model(), candidate.name, base.name)
            with new_folder(config.output / candidate.name) as folder:
                write_peft(expert, folder / "unet", dtype=torch.float16)
        PartialState().wait_for_everyone()
    finally:
        adapted.unload()
    return result


def main(config: CandidatesConfig) -> None:
    """Train the LoRAs that are not there yet."""
    missing = [c for c in config.candidates if not (config.output / c.name).exists()]
    if not missing:
        print(f"all {len(config.candidates)} LoRAs are in {config.output}")
        return
    # All folders are read before the first step: a fault in the last one shows at once.
    examples = {c.name: read_examples(c.data, c.prompt) for c in missing}
    base = Base.load(config.base)
    base.check_resolution(config.denoise.resolution)
    for candidate in missing:
        check_targets(base.unet, candidate.name, candidate.targets)
    for candidate in missing:
        result = train_candidate(base, examples[candidate.name], candidate, config)
        if PartialState().is_main_process:
            print(
                f"{config.output / candidate.name}: {len(examples[candidate.name])} examples, "
                f"{result.step} steps, {result.seconds:.0f} s"
            )


if __name__ == "__main__":
    with as_messages("dreambooth"):
        main(auto_cli(CandidatesConfig, as_positional=False))
