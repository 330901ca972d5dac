"""What SDXL is told of a picture's size and cut (arXiv 2307.01952, section 2.2)."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# The orientations of EXIF in which height and width change places.
_TURNED = frozenset({5, 6, 7, 8})
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Frame:
    """Each (height, width) in pixels, or (top, left): SDXL's six time ids in their order.

    Args:
        original: The picture's size as it lies on disk.
        corner: Where its cut begins, after the change of size.
        target: The size that is shown or drawn.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]

    def ids(self) -> tuple[int, ...]:
        """The six numbers."""
        return self.original + self.corner + self.target


def whole(height: int, width: int) -> Frame:
    """A picture of that very size, not cut: what a drawing is asked to look like."""
    return Frame((height, width), (0, 0), (height, width))


def middle_square(file: Path, resolution: int) -> Frame:
    """The frame of a picture that is shown as `load_picture` cuts it."""
    with Image.open(file) as picture:
        width, height = picture.size
        if picture.getexif().get(_ORIENTATION) in _TURNED:
            width, height = height, width
    short = min(height, width)
    top, left = (round((side * resolution / short - resolution) / 2) for side in (height, width))
    return Frame((height, width), (top, left), (resolution, resolution))
