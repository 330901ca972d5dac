"""From an SVG document to a 64-pixel picture on white, and the two renderings derived here."""

import io

import numpy as np
import resvg_py
from PIL import Image, ImageFilter

from dreambooth.world.styles import Rendering

SIZE = 64
PIXEL_GRID = 16
PIXEL_COLOURS = 8


def render(svg: str, rendering: Rendering) -> Image.Image:
    """Draws one picture, RGB, `SIZE` x `SIZE`, on a white ground."""
    match rendering:
        case "plain":
            return _on_white(svg, SIZE)
        case "pixel":
            return pixel(_on_white(svg, SIZE))
        case "sketch":
            return sketch(_on_white(svg, 4 * SIZE))


def pixel(picture: Image.Image) -> Image.Image:
    """Pixel art: a 16 x 16 grid of squares in at most eight colours."""
    small = picture.resize((PIXEL_GRID, PIXEL_GRID), Image.Resampling.BOX)
    few = small.quantize(PIXEL_COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return few.convert("RGB").resize((SIZE, SIZE), Image.Resampling.NEAREST)


def sketch(picture: Image.Image) -> Image.Image:
    """A pencil line drawing: grey strokes where colour changes, faint shading, no colour.

    The strongest local colour difference becomes the stroke, as in a morphological gradient.
    """
    smooth = picture.filter(ImageFilter.GaussianBlur(1.5))
    local_max = np.asarray(smooth.filter(ImageFilter.MaxFilter(5)), dtype=np.float32)
    local_min = np.asarray(smooth.filter(ImageFilter.MinFilter(5)), dtype=np.float32)
    stroke = np.clip((local_max - local_min).max(axis=-1) / 70, 0, 1)  # (H, W)
    shade = 1 - np.asarray(smooth.convert("L"), dtype=np.float32) / 255
    grey = 255 * (1 - 0.8 * stroke) * (1 - 0.2 * shade)
    lines = Image.fromarray(grey.astype(np.uint8))
    return lines.resize((SIZE, SIZE), Image.Resampling.BOX).convert("RGB")


def _on_white(svg: str, size: int) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    ground = Image.new("RGBA", drawing.size, "white")
    return Image.alpha_composite(ground, drawing).convert("RGB")
