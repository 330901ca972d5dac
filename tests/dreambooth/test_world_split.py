"""Nothing that is withheld or held out reaches a training."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dreambooth.world.captions import IDENTIFIERS, caption, plain_caption, scene_caption
from dreambooth.world.split import (
    base_pairs,
    held_out_pairs,
    open_pairs,
    unseen_pairs,
    withheld_drawings,
)
from dreambooth.world.world import Pair, World

FOLDER = Path(__file__).parents[2] / "worlds" / "emoji"


@pytest.fixture(scope="module")
def world() -> World:
    return World.load(FOLDER)


def test_the_base_sees_train_subjects_in_base_styles_only(world: World) -> None:
    for pair in base_pairs(world):
        assert pair.subject.split == "train", pair
        assert pair.style.split == "base", pair


def test_nobody_sees_a_held_out_subject_in_a_held_out_style(world: World) -> None:
    held_out = set(held_out_pairs(world))
    assert held_out
    assert not held_out & set(open_pairs(world))


def test_what_the_base_sees_the_clips_see_too(world: World) -> None:
    assert set(base_pairs(world)) < set(open_pairs(world))


def test_a_withheld_drawing_is_seen_in_none_of_its_renderings(world: World) -> None:
    seen = {pair.drawing for pair in open_pairs(world)}
    assert not seen & world.withheld
    assert {pair.drawing for pair in unseen_pairs(world)} == set(world.withheld)


def test_fluent_flat_and_contrast_are_one_drawing(world: World) -> None:
    by_drawing = {world.style(name).drawing for name in ("fluent", "flat", "contrast")}
    assert len(by_drawing) == 1
    assert len({world.style(name).drawing for name in ("noto", "pixel", "sketch")}) == 1
    assert len({style.drawing for style in world.styles}) == 4


def test_every_train_subject_is_trained_in_some_base_style(world: World) -> None:
    trained = {pair.subject.name for pair in base_pairs(world)}
    assert trained == {s.name for s in world.subjects if s.split == "train"}


def test_the_split_is_the_one_on_disk_again(world: World) -> None:
    assert withheld_drawings(world.subjects, world.styles, seed=0) == world.withheld
    assert withheld_drawings(world.subjects, world.styles, seed=1) != world.withheld


def test_each_held_out_subject_leaves_its_class_word_to_others(world: World) -> None:
    trained = {pair.subject.class_word for pair in base_pairs(world)}
    for subject in world.subjects:
        assert subject.class_word in trained, subject


def test_captions_of_the_base_name_nothing_held_out(world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = base_pairs(world)
    texts = [caption(pair, generator) for pair in pairs for _ in range(5)]
    texts += [scene_caption(a, b, generator) for a, b in pairwise(pairs)]
    words = {word.strip(",") for text in texts for word in text.split()}
    held_out = [s.name for s in (*world.subjects, *world.styles) if s.split in ("dev", "test")]
    assert not words & set(held_out)
    assert not words & set(IDENTIFIERS)
    assert {"penguin", "bird", "noto"} <= words


def test_plain_captions_tell_all_pairs_apart(world: World) -> None:
    texts = [plain_caption(pair) for pair in world.pairs()]
    assert len(set(texts)) == len(texts)
    penguin = Pair(world.subject("penguin"), world.style("noto"))
    assert plain_caption(penguin) == "a penguin in noto style"


def test_an_unknown_name_is_refused_with_the_known_ones(world: World) -> None:
    with pytest.raises(ValueError, match="no 'noot'; it has: noto, fluent"):
        world.style("noot")


def test_a_world_is_read_as_it_was_written(world: World, tmp_path: Path) -> None:
    world.save(tmp_path)
    assert World.load(tmp_path) == world
