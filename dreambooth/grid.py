"""Pictures side by side, with a name at each row."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mole_vl.files import new_file

_MARGIN = 4
_NAMES = 110
_LINE = 12


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, h, w) in [-1, 1] as an image."""
    pixels = (picture.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return Image.fromarray(np.asarray(pixels.permute(1, 2, 0).cpu()))


def save_grid(rows: Mapping[str, Tensor], file: Path, zoom: int = 1) -> None:
    """Write one row of pictures a name.

    Args:
        rows: Pictures (n, 3, h, w) in [-1, 1] by name; all of one height and width.
        file: A PNG.
        zoom: Whole factor by which pictures are enlarged, without smoothing.
    """
    height, width = (side * zoom + _MARGIN for side in next(iter(rows.values())).shape[-2:])
    columns = max(len(pictures) for pictures in rows.values())
    page = Image.new("RGB", (_NAMES + columns * width, _MARGIN + len(rows) * height), "white")
    pen = ImageDraw.Draw(page)
    for index, (name, pictures) in enumerate(rows.items()):
        top = _MARGIN + index * height
        pen.text((_MARGIN, top + (height - _LINE) // 2), name, fill="black")
        for column, picture in enumerate(pictures):
            image = to_image(picture)
            size = (image.width * zoom, image.height * zoom)
            page.paste(image.resize(size, Image.Resampling.NEAREST), (_NAMES + column * width, top))
    with new_file(file) as partial:
        page.save(partial, format="PNG")
