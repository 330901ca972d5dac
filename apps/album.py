"""The pictures that gates are trained with: each LoRA's own, and ordinary ones."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dreambooth.data import SUFFIXES, load_picture
from dreambooth.grid import to_image
from dreambooth.world.candidates import (
    FILE,
    ORDINARY,
    candidate_pairs,
    load_candidates,
    write_candidate,
    write_plain,
)
from dreambooth.world.pictures import Pictures
from dreambooth.world.split import base_pairs
from dreambooth.world.world import World
from mole_vl.faults import refuse
from mole_vl.files import new_folder

ORDINARY_PICTURES = "ordinary pictures"
MAX_PICTURES = 64
_MAX_SIDE = 8192
_SIDE = 512


class Album:
    """Pictures that are there without an upload.

    Args:
        folders: Each LoRA's own, by its name, and the ordinary ones: those that exist are used.
        world: A world's folder; its pictures are drawn when they are first asked for.
        scratch: Where they are written.
    """

    def __init__(self, folders: Mapping[str, Path], world: Path, scratch: Path) -> None:
        self._folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
        known = load_candidates(world) if (world / FILE).is_file() else []
        self._known = {candidate.name: candidate for candidate in known}
        self._world = world
        self._scratch = scratch
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        """Whether there are pictures of a LoRA, or ordinary ones."""
        return name in self._folders or name in self._known or self._has_ordinary(name)

    def __getitem__(self, name: str) -> Path:
        """The folder of a LoRA's pictures, or of the ordinary ones.

        Raises:
            KeyError: There are none.
        """
        with self._lock:
            if name not in self._folders:
                self._folders[name] = self._write(name)
            return self._folders[name]

    def _has_ordinary(self, name: str) -> bool:
        return name == ORDINARY_PICTURES and bool(self._known)

    def _write(self, name: str) -> Path:
        if name not in self:
            raise KeyError(name)
        world = World.load(self._world)
        pictures = Pictures.load(self._world, world)
        folder = self._scratch / name
        if self._has_ordinary(name):
            write_plain(folder, base_pairs(world)[::ORDINARY], pictures)
        else:
            of = self._known[name]
            write_candidate(folder, candidate_pairs(world, of), of, pictures)
        return folder


def take_pictures(files: Sequence[Path], folder: Path) -> None:
    """Keep uploaded pictures as a folder, all of them or none.

    They are drawn anew as square PNGs, so that nothing but pixels is kept.

    Raises:
        ValueError: Files that are no pictures, or too many or too large ones.
    """
    many = len(files) > MAX_PICTURES
    refuse(
        "upload",
        [f"there are {len(files)} pictures, expected at most {MAX_PICTURES}" if many else None],
    )
    with new_folder(folder) as partial:
        faults = [_kept(file, partial / f"{n:03d}.png") for n, file in enumerate(files)]
        refuse("upload", faults)


def _kept(file: Path, target: Path) -> str | None:
    """The fault of an uploaded picture, or None if it is kept."""
    if file.suffix.lower() not in SUFFIXES:
        return f"{file.name} is of another type, expected {', '.join(sorted(SUFFIXES))}"
    try:
        with Image.open(file) as picture:
            width, height = picture.size
        if max(width, height) > _MAX_SIDE:
            return f"{file.name} is {width} x {height}, expected at most {_MAX_SIDE} pixels a side"
        to_image(load_picture(file, _SIDE)).save(target)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        return f"{file.name} is damaged or no picture"
    return None
