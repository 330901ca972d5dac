"""The world's pictures: one lossless atlas per style, a cell per subject in the world's order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth.world.render import SIZE
from dreambooth.world.world import Pair, World

COLUMNS = 16
FOLDER = "pictures"


def write_atlas(file: Path, pictures: Sequence[Image.Image]) -> None:
    """Writes pictures of `SIZE` x `SIZE` row by row into one PNG."""
    atlas = Image.new("RGB", (COLUMNS * SIZE, -(-len(pictures) // COLUMNS) * SIZE), "white")
    for index, picture in enumerate(pictures):
        atlas.paste(picture, _corner(index))
    partial = file.with_suffix(".partial")
    atlas.save(partial, format="PNG", optimize=True)
    partial.rename(file)


def read_atlas(file: Path, count: int) -> Tensor:
    """The first `count` pictures of an atlas: uint8 (count, 3, SIZE, SIZE)."""
    pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))  # (H, W, 3)
    corners = [_corner(index) for index in range(count)]
    return torch.stack(
        [pixels[y : y + SIZE, x : x + SIZE].permute(2, 0, 1) for x, y in corners]
    ).contiguous()


class Pictures:
    """All pictures of a world in memory, by pair."""

    def __init__(self, world: World, atlases: Mapping[str, Tensor]) -> None:
        self._cells = {subject.name: index for index, subject in enumerate(world.subjects)}
        self._atlases = atlases

    @classmethod
    def load(cls, folder: Path, world: World) -> "Pictures":
        """Reads the atlases of the world that lies in `folder`."""
        count = len(world.subjects)
        files = {style.name: folder / FOLDER / f"{style.name}.png" for style in world.styles}
        return cls(world, {name: read_atlas(file, count) for name, file in files.items()})

    def __getitem__(self, pair: Pair) -> Tensor:
        """One picture, uint8 (3, SIZE, SIZE)."""
        return self._atlases[pair.style.name][self._cells[pair.subject.name]]


def write_pictures(folder: Path, world: World, draw: Callable[[Pair], Image.Image]) -> None:
    """Draws the whole world into `folder`, one atlas per style."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for style in world.styles:
        drawn = [draw(Pair(subject, style)) for subject in world.subjects]
        write_atlas(folder / FOLDER / f"{style.name}.png", drawn)


def _corner(index: int) -> tuple[int, int]:
    return index % COLUMNS * SIZE, index // COLUMNS * SIZE
