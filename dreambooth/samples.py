"""Pictures drawn on the way of a training, always from the same noise."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from dreambooth.base import Base
from dreambooth.candidates import CandidateConfig, CandidatesConfig
from dreambooth.drawing import draw
from dreambooth.grid import save_grid, to_image
from mole_vl.training import Progress, Watch, mix_seed

# A stream of random numbers of its own.
_STREAM = 4


def sampling_watch(
    base: Base, candidate: CandidateConfig, config: CandidatesConfig
) -> Watch | None:
    """Draws a candidate's sample prompts into its run's folder and the trackers.

    `samples/step-00000100.png` has a row for each prompt.
    """
    if not candidate.samples:
        return None
    folder = config.fit.output / candidate.name / "samples"
    seeds = [mix_seed(config.fit.seed, index, _STREAM) for index in range(len(candidate.samples))]

    def watch(progress: Progress) -> None:
        step, accelerator = progress.step, progress.accelerator
        due = step % config.sample_every == 0 or step == progress.steps
        if not (due and accelerator.is_main_process):
            return
        with accelerator.autocast():
            drawn = draw(base, candidate.samples, seeds, config.denoise.resolution, config.draw)
            pictures = torch.stack(list(drawn)).cpu()
        _save(dict(zip(candidate.samples, pictures, strict=True)), folder, step)
        _track(dict(zip(candidate.samples, pictures, strict=True)), accelerator, step)

    return watch


def _save(pictures: dict[str, torch.Tensor], folder: Path, step: int) -> None:
    rows = {prompt: picture[None] for prompt, picture in pictures.items()}
    save_grid(rows, folder / f"step-{step:08d}.png")


def _track(pictures: dict[str, torch.Tensor], accelerator: Accelerator, step: int) -> None:
    shown = {
        f"samples/{prompt}": np.asarray(to_image(picture))[None]
        for prompt, picture in pictures.items()
    }
    for tracker in accelerator.trackers:
        # The only tracker that is told the order of axes; not every one takes pictures.
        order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images(shown, step=step, **order)
