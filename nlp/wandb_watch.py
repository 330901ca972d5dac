"""What Weights & Biases sees of a training beside its log."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mole_vl.training import Progress

Watched = Literal["gradients", "parameters", "all"]
Kept = Literal["end", "checkpoint"]


class WandbWatch:
    """A watch of `fit` for runs with the tracker `wandb`.

    Args:
        module: The model in training.
        name: What its artifacts are called.
        write: Writes what is trained, as it is by now, into a folder.
        watched: Histograms of what: gradients, parameters, or all; None for none.
        kept: When wandb gets the folder: at the end, or with each checkpoint; None for never.
        save_every: Steps between checkpoints.
        log_every: Steps between histograms.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        write: Callable[[Path], None],
        *,
        watched: Watched | None,
        kept: Kept | None,
        save_every: int,
        log_every: int,
    ) -> None:
        self._module = module
        self._name = name
        self._write = write
        self._watched = watched
        self._kept = kept
        self._save_every = save_every
        self._log_every = log_every
        self._begun = False

    def __call__(self, progress: Progress) -> None:
        """Called after each step."""
        if not progress.accelerator.is_main_process:
            return
        run: Any = progress.accelerator.get_tracker("wandb", unwrap=True)
        if self._watched and not self._begun:
            run.watch(self._module, log=self._watched, log_freq=self._log_every)
        self._begun = True
        checkpoint = self._kept == "checkpoint" and progress.step % self._save_every == 0
        if checkpoint or (self._kept and progress.step == progress.steps):
            with tempfile.TemporaryDirectory() as folder:
                self._write(Path(folder) / self._name)
                run.log_artifact(str(Path(folder) / self._name), name=self._name, type="model")
