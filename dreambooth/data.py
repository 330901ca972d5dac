"""Pictures on disk, each with what it shows in words.

A folder is one of datasets' imagefolder: pictures, and `metadata.jsonl` with a line of `file_name`
and `text` for each example; a picture may have several lines, one without a line is left out. Or a
folder of pictures that share one prompt, as DreamBooth has it.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from mole_vl.faults import refuse
from mole_vl.files import check_file

METADATA = "metadata.jsonl"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True)
class Example:
    """A picture and its caption."""

    file: Path
    text: str


def read_examples(folder: Path, prompt: str | None = None) -> list[Example]:
    """The examples of a folder, in the order of its metadata, or of its files' names.

    Args:
        folder: Pictures, with or without metadata.jsonl.
        prompt: Caption of all pictures, for a folder without.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No pictures, no captions or twice as many, lines that are no examples, files
            that are missing or no pictures; all that is wrong with the folder at once.
    """
    _check_folder(folder)
    metadata = folder / METADATA
    if metadata.exists() and prompt is not None:
        raise ValueError(f"{folder} has a {METADATA}, and a prompt is given: expected one of them")
    if not metadata.exists():
        files = picture_files(folder)
        if prompt is None:
            raise ValueError(f"{folder} has no {METADATA}, and no prompt is given: expected one")
        return [Example(file, prompt) for file in files]
    examples = _captioned(metadata)
    _check_pictures(folder, dict.fromkeys(example.file for example in examples))
    return examples


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder by name, whatever its metadata says.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No pictures, or files that are none, all of them.
    """
    _check_folder(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    _check_pictures(folder, files)
    return files


def check_picture(name: str, file: Path) -> None:
    """Raise FileNotFoundError or ValueError, naming the setting, unless a file is a picture."""
    check_file(name, file, "a picture")
    refuse(name, [_fault(file)])


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected one of pictures")


def _check_pictures(folder: Path, files: Collection[Path]) -> None:
    if not files:
        raise ValueError(f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    refuse(str(folder), [_fault(file) for file in files])


def _captioned(metadata: Path) -> list[Example]:
    examples: list[Example] = []
    faults: list[str] = []
    # Not `splitlines`: JSON's strings may hold what it takes for the end of a line.
    for number, line in enumerate(metadata.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            values = found["file_name"], found["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            values = (None, None)
        name, text = values
        if isinstance(name, str) and isinstance(text, str):
            examples.append(Example(metadata.parent / name, text))
        else:
            faults.append(f"line {number} is {line[:60]!r}, expected file_name and text")
    refuse(str(metadata), faults)
    return examples


def _fault(file: Path) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        with Image.open(file) as picture:
            picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        return f"{file.name} is damaged or no picture ({error})"
    return None


def load_picture(file: Path, resolution: int) -> Tensor:
    """A picture cut to its middle square, float (3, resolution, resolution) in [-1, 1].

    A smaller one is enlarged; what is transparent becomes white.
    """
    with Image.open(file) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    flat = Image.alpha_composite(white, upright).convert("RGB")
    square = ImageOps.fit(flat, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """A small move and change of size, drawn anew each time a picture is shown.

    What comes into the page from outside is the page's edge, drawn out.

    Args:
        shift: Largest move along x and along y, as a share of the side.
        shrink: Smallest size, as a share of the picture's own; the largest is its own.
    """

    shift: float = 0.0
    shrink: float = 1.0

    def __post_init__(self) -> None:
        refuse(
            "Jitter",
            [
                None if 0 <= self.shift < 1 else f"shift is {self.shift}, expected 0 <= shift < 1",
                None
                if 0 < self.shrink <= 1
                else f"shrink is {self.shrink}, expected 0 < shrink <= 1",
            ],
        )

    def __call__(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """The picture (3, H, W), moved and shrunk."""
        if self == Jitter():
            return picture
        across, down, shrunk = torch.rand(3, generator=generator).tolist()
        size = 1 - (1 - self.shrink) * shrunk
        # grid_sample asks, for each place of the page (-1 to 1), where in the picture it lies.
        x, y = (2 * self.shift * (2 * part - 1) / size for part in (across, down))
        where = picture.new_tensor([[[1 / size, 0.0, -x], [0.0, 1 / size, -y]]])
        grid = F.affine_grid(where, [1, *picture.shape], align_corners=False)
        moved = F.grid_sample(
            picture[None], grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return moved[0]
