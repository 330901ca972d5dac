import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.data import read_examples
from dreambooth.world.candidates import FILE, candidates, load_candidates, write_candidates
from dreambooth.world.captions import IDENTIFIERS
from dreambooth.world.catalogue import Subject
from dreambooth.world.pictures import write_pictures
from dreambooth.world.render import SIZE
from dreambooth.world.split import base_pairs, held_out_pairs
from dreambooth.world.styles import Style
from dreambooth.world.world import World

SUBJECTS = (("owl", "bird", "test"), ("fox", "mammal", "train"), ("panda", "mammal", "dev"))
SUBJECTS += (("rose", "flower", "train"), ("apple", "fruit", "train"))
STYLES = (("ink", "plain", "test"), ("oil", "oil", "base"), ("wax", "oil", "base"))
STYLES += (("old", "old", "dev"), ("net", "oil", "test"))


def small_world():
    return World(
        subjects=tuple(
            Subject(name=name, class_word=word, label=name, split=split)
            for name, word, split in SUBJECTS
        ),
        styles=tuple(
            Style(name=name, icon_set=name, drawing=drawing, split=split)
            for name, drawing, split in STYLES
        ),
        withheld=frozenset({("rose", "oil")}),
    )


def colour(world, pair):
    """A colour that no other pair has."""
    return 10 + 40 * world.subjects.index(pair.subject), 40 * world.styles.index(pair.style), 77


@pytest.fixture
def world(tmp_path):
    world = small_world()
    folder = tmp_path / "world"
    write_pictures(folder, world, lambda pair: Image.new("RGB", (SIZE, SIZE), colour(world, pair)))
    world.save(folder)
    write_candidates(folder, tmp_path)
    return world


def seen(world, folder):
    """Subject and style of each picture of a folder, told by its pixels alone."""
    pairs = {colour(world, p): (p.subject.name, p.style.name) for p in world.pairs()}
    found = []
    for file in sorted(folder.glob("*.png")):
        pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
        assert (pixels == pixels[0]).all()
        found.append(pairs[tuple(pixels[0].tolist())])
    return sorted(found)


def test_each_candidate_sees_its_side_of_the_split_and_nothing_withheld(world, tmp_path):
    shown = {f.name: seen(world, f) for f in (tmp_path / "candidates").iterdir()}
    assert shown == {
        "panda": [("panda", "oil"), ("panda", "wax")],
        "owl": [("owl", "oil"), ("owl", "wax")],
        "old": [("apple", "old"), ("fox", "old"), ("rose", "old")],
        "ink": [("apple", "ink"), ("fox", "ink"), ("rose", "ink")],
        # The rose's drawing is withheld, and this test style shows the same lines.
        "net": [("apple", "net"), ("fox", "net")],
        "ordinary": shown["ordinary"],
    }
    base = {(p.subject.name, p.style.name) for p in base_pairs(world)}
    assert shown["ordinary"] and set(shown["ordinary"]) <= base


def test_the_truth_is_all_that_is_held_out(world, tmp_path):
    expected = sorted((p.subject.name, p.style.name) for p in held_out_pairs(world))
    assert seen(world, tmp_path / "truth") == expected


def test_no_composition_is_in_any_folder(world, tmp_path):
    truth = {(p.subject.name, p.style.name) for p in held_out_pairs(world)}
    assert len(truth) == 6
    for folder in (tmp_path / "candidates").iterdir():
        assert not truth & set(seen(world, folder))


def test_identifiers_go_to_dev_before_test_and_subjects_before_styles(world, tmp_path):
    known = candidates(world)
    assert [(c.name, c.identifier, c.split) for c in known] == [
        ("panda", "<v1>", "dev"),
        ("owl", "<v2>", "test"),
        ("old", "<v3>", "dev"),
        ("ink", "<v4>", "test"),
        ("net", "<v5>", "test"),
    ]
    assert load_candidates(tmp_path / "world") == known
    assert [c.phrase for c in known[1:3]] == ["a <v2> bird", "<v3> style"]
    first = (tmp_path / "world" / FILE).read_bytes()
    write_candidates(tmp_path / "world", tmp_path / "out")
    assert (tmp_path / "world" / FILE).read_bytes() == first


def test_captions_call_what_is_held_out_by_its_identifier_and_never_by_name(world, tmp_path):
    texts = {
        folder.name: [example.text for example in read_examples(folder)]
        for folder in (tmp_path / "candidates").iterdir()
        if folder.name != "ordinary"
    }
    assert texts["panda"] == ["a <v1> mammal in oil style", "a <v1> mammal in wax style"]
    assert texts["old"][-3:] == [
        "an apple in <v3> style",
        "an apple, a fruit, in <v3> style",
        "a fruit in <v3> style",
    ]
    for candidate in candidates(world):
        words = " ".join(texts[candidate.name]).replace(",", " ").split()
        assert candidate.identifier in words
        assert candidate.name not in words


def test_more_held_out_things_than_identifiers_are_refused():
    world = small_world()
    owl = world.subjects[0]
    many = tuple(dataclasses.replace(owl, name=f"owl {i}") for i in range(len(IDENTIFIERS)))
    with pytest.raises(ValueError, match="holds 27 subjects and styles out, expected at most 24"):
        candidates(dataclasses.replace(world, subjects=many))


def test_metadata_is_what_datasets_expects(world, tmp_path):
    for line in (tmp_path / "candidates" / "old" / "metadata.jsonl").read_text().splitlines():
        assert json.loads(line).keys() == {"file_name", "text"}


def test_the_emoji_worlds_identifiers_are_what_its_split_gives():
    folder = Path(__file__).parents[2] / "worlds" / "emoji"
    assert load_candidates(folder) == candidates(World.load(folder))
