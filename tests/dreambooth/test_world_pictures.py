"""Pictures: lossless atlases, pages that keep a drawing whole, the two derived renderings."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreambooth.world.pictures import COLUMNS, Pictures, read_atlas, write_atlas
from dreambooth.world.render import PIXEL_COLOURS, SIZE, pixel, sketch
from dreambooth.world.scenes import HALF, placed, scene, to_float, to_uint8
from dreambooth.world.world import Pair, World

FOLDER = Path(__file__).parents[2] / "worlds" / "emoji"


def noise_picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def disc() -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    inside = (x - 31.5) ** 2 + (y - 31.5) ** 2 < 30**2
    return torch.where(inside, -1.0, 1.0).expand(3, -1, -1).clone()


def test_an_atlas_gives_every_picture_back_bit_for_bit(tmp_path: Path) -> None:
    pictures = [noise_picture(seed) for seed in range(COLUMNS + 3)]
    write_atlas(tmp_path / "a.png", pictures)
    read = read_atlas(tmp_path / "a.png", len(pictures))
    for picture, tensor in zip(pictures, read, strict=True):
        assert np.array_equal(np.asarray(picture), tensor.permute(1, 2, 0).numpy())


def test_the_world_has_a_different_picture_for_every_pair() -> None:
    world = World.load(FOLDER)
    pictures = Pictures.load(FOLDER, world)
    seen = {pictures[pair].numpy().tobytes() for pair in world.pairs()}
    assert len(seen) == len(world.pairs())
    penguin = pictures[Pair(world.subject("penguin"), world.style("contrast"))].float()
    assert penguin.std(dim=0).max() < 1, "the contrast style is black on white"


def test_to_float_and_back_is_the_identity() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)


def test_a_placed_drawing_stays_whole_and_its_ink_changes_by_its_size_only() -> None:
    ink = (1 - disc()).sum()
    for seed in range(20):
        page = placed(disc(), torch.Generator().manual_seed(seed))
        share = float((1 - page).sum() / ink)
        assert (56 / 64) ** 2 - 0.01 <= share <= 1.01


def test_a_scene_keeps_left_on_the_left() -> None:
    white = torch.ones(3, SIZE, SIZE)
    page = scene(disc(), white, torch.Generator().manual_seed(0))
    assert (page[..., HALF:] == 1).all()
    assert (page[..., :HALF] < 0).any()


def test_the_same_seed_places_the_same_way() -> None:
    first, second = (placed(disc(), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_pixel_art_is_squares_in_few_colours() -> None:
    drawn = np.asarray(pixel(noise_picture(0)))
    squares = drawn.reshape(16, 4, 16, 4, 3)
    assert (squares == squares[:, :1, :, :1]).all()
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) <= PIXEL_COLOURS


def test_a_sketch_is_grey_and_leaves_the_page_white() -> None:
    page = Image.new("RGB", (4 * SIZE, 4 * SIZE), "white")
    page.paste("red", (64, 64, 192, 192))
    drawn = np.asarray(sketch(page)).astype(int)
    assert (drawn.max(-1) == drawn.min(-1)).all()
    assert (drawn[:8] == 255).all()
    assert drawn[16].min() < drawn[32, 32].min(), "the outline is darker than the inside"
