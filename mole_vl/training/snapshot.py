"""A run on disk: complete or absent, never in between."""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_vl.files import read_object, read_tensors

_PREFIX = "checkpoint-"
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands: after `step` steps; tensors by name, on the CPU.

    `scaler` is the state of fp16's gradient scaler, empty in other precisions.
    """

    step: int
    settings: Mapping[str, object]
    weights: Mapping[str, Tensor]
    averages: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_snapshot(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/checkpoint-STEP` in one rename, then drop older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_PARTIAL}{snapshot.step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(
        {k: v.contiguous() for k, v in snapshot.weights.items()}, partial / "weights.safetensors"
    )
    save_file(
        {k: v.contiguous() for k, v in snapshot.averages.items()}, partial / "averages.safetensors"
    )
    state = {"optimizer": dict(snapshot.optimizer), "scaler": dict(snapshot.scaler)}
    torch.save(state, partial / "optimizer.pt")
    header = {"step": snapshot.step, "settings": dict(snapshot.settings)}
    (partial / "run.json").write_text(json.dumps(header, indent=2))
    for file in partial.iterdir():
        _sync(file)
    final = folder / f"{_PREFIX}{snapshot.step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    for old in _snapshots(folder):
        if old.name < final.name:
            shutil.rmtree(old)
    return final


def _snapshots(folder: Path) -> list[Path]:
    """Complete snapshots, oldest first; folders that are called otherwise are somebody else's."""
    return sorted(
        path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit() and path.is_dir()
    )


def read_snapshot(folder: Path) -> Snapshot | None:
    """The newest complete snapshot under `folder`, or None. Partial ones are swept away.

    Raises:
        ValueError: It is damaged.
    """
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
    found = _snapshots(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        header = read_object(newest / "run.json")
        state = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
        return Snapshot(
            step=header["step"],
            settings=header["settings"],
            weights=read_tensors(newest / "weights.safetensors"),
            averages=read_tensors(newest / "averages.safetensors"),
            optimizer=state["optimizer"],
            scaler=state["scaler"],
        )
    except (ValueError, LookupError, EOFError, OSError, RuntimeError, pickle.PickleError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{newest} is damaged ({type(error).__name__}: {said}): remove it, and the run starts "
            "anew"
        ) from error


def drop_snapshots(folder: Path) -> None:
    """Remove the snapshots of a run whose outcome is kept elsewhere; its log stays."""
    for old in _snapshots(folder):
        shutil.rmtree(old)
