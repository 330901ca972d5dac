"""What Weights & Biases sees of a training beside its log."""

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import nn

from mole_vl.training import FitConfig, Progress

Watched = Literal["gradients", "parameters", "all"]
Kept = Literal["end", "checkpoint"]


def switch_faults(watch: bool | str, log_model: bool | str) -> list[str | None]:
    """What is wrong with the settings wandb_watch and wandb_log_model, None for what is right."""
    return [
        _fault_of_switch("wandb_watch", watch, get_args(Watched)),
        _fault_of_switch("wandb_log_model", log_model, get_args(Kept)),
    ]


def _fault_of_switch(name: str, value: bool | str, words: Collection[str]) -> str | None:
    if isinstance(value, bool) or value in (*words, ""):
        return None
    return f"{name} is {value!r}, expected true, false, {', '.join(words)}"


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


def watch_by(
    watch: bool | str,
    log_model: bool | str,
    module: nn.Module,
    run: FitConfig,
    write: Callable[[Path], None],
) -> WandbWatch:
    """The watch that the settings wandb_watch and wandb_log_model ask for.

    Args:
        watch: true for gradients, or one of `Watched`.
        log_model: true for the end, or one of `Kept`.
        module: The model in training.
        run: Its loop; artifacts are called as its folder.
        write: Writes what is trained, as it is by now, into a folder.
    """
    return WandbWatch(
        module,
        run.output.name,
        write,
        watched=cast(Watched | None, "gradients" if watch is True else watch or None),
        kept=cast(Kept | None, "end" if log_model is True else log_model or None),
        save_every=run.save_every,
        log_every=run.log_every,
    )
