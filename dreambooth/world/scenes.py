"""From drawings to training pictures: one drawing somewhere on the page, or two at half size.

Pictures are float (3, SIZE, SIZE) in [-1, 1]; the page is white.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dreambooth.world.render import SIZE

SMALLEST = 56
HALF = SIZE // 2


def to_float(picture: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1]."""
    return picture.float() / 127.5 - 1


def to_uint8(picture: Tensor) -> Tensor:
    """[-1, 1] back to uint8 pixels."""
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def placed(picture: Tensor, generator: Generator) -> Tensor:
    """The whole drawing at 56 to 64 pixels, anywhere on the page."""
    size = _integer(SMALLEST, SIZE, generator)
    x, y = _integer(0, SIZE - size, generator), _integer(0, SIZE - size, generator)
    return _paste(_blank(), _resized(picture, size), x, y)


def scene(left: Tensor, right: Tensor, generator: Generator) -> Tensor:
    """Two drawings side by side at half size, each at a height of its own."""
    page = _blank()
    for picture, x in ((left, 0), (right, HALF)):
        page = _paste(page, _resized(picture, HALF), x, _integer(8, HALF - 8, generator))
    return page


def _blank() -> Tensor:
    return torch.ones(3, SIZE, SIZE)


def _resized(picture: Tensor, size: int) -> Tensor:
    shape = (size, size)
    resized = F.interpolate(picture[None], shape, mode="bilinear", antialias=True)
    return resized[0]


def _paste(page: Tensor, picture: Tensor, x: int, y: int) -> Tensor:
    page[:, y : y + picture.shape[1], x : x + picture.shape[2]] = picture
    return page


def _integer(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
