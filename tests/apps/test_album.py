"""Pictures to learn from: a world's own, and uploaded ones."""

from pathlib import Path

import pytest
from PIL import Image

from apps.album import Album, take_pictures
from dreambooth.data import load_picture, picture_files, read_examples
from dreambooth.world.candidates import ORDINARY
from dreambooth.world.split import base_pairs
from dreambooth.world.world import World
from tests.dreambooth.toys import write_picture

WORLD = Path("worlds/emoji")


def test_a_worlds_pictures_are_drawn_when_asked_for(tmp_path):
    (tmp_path / "own").mkdir()
    write_picture(tmp_path / "own" / "a.png")
    folders = {"mug": tmp_path / "own", "gone": tmp_path / "gone"}
    album = Album(folders, WORLD, tmp_path / "album")
    assert "panda" in album and "ordinary pictures" in album and "gone" not in album
    assert album["mug"] == tmp_path / "own" and not (tmp_path / "album").exists()
    examples = read_examples(album["panda"])
    assert examples and all("<v1> mammal in" in example.text for example in examples)
    assert not any("retro" in example.file.name for example in examples)
    expected = len(base_pairs(World.load(WORLD))[::ORDINARY])
    assert len(picture_files(album["ordinary pictures"])) == expected
    with pytest.raises(KeyError):
        album["gone"]
    assert "panda" not in Album({}, tmp_path, tmp_path)


def test_uploaded_pictures_are_kept_as_nothing_but_pixels(tmp_path):
    files = [write_picture(tmp_path / "up" / f"{i}.jpg", seed=i, size=(40, 30)) for i in range(2)]
    take_pictures(files, tmp_path / "kept")
    kept = picture_files(tmp_path / "kept")
    assert [file.name for file in kept] == ["000.png", "001.png"]
    with Image.open(kept[0]) as picture:
        assert picture.size == (512, 512) and not picture.info
    difference = load_picture(kept[0], 16) - load_picture(files[0], 16)
    assert difference.abs().mean() < 0.2


def test_one_bad_picture_and_nothing_is_kept(tmp_path):
    good = write_picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"GIF89a no picture")
    (tmp_path / "page.html").write_text("<script>")
    wide = tmp_path / "wide.png"
    Image.new("1", (9000, 2)).save(wide)
    with pytest.raises(
        ValueError,
        match=r"bad.png is damaged or no picture; page.html is of another type.*; wide.png is 9000",
    ):
        take_pictures([good, tmp_path / "bad.png", tmp_path / "page.html", wide], tmp_path / "kept")
    with pytest.raises(ValueError, match="there are 65 pictures, expected at most 64"):
        take_pictures([good] * 65, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
