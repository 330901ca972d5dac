import json

import datasets
import pytest
import torch
from PIL import Image

from dreambooth.data import Example, Jitter, load_picture, read_examples
from tests.dreambooth.toys import SIDE, write_examples, write_picture


def metadata(folder, *lines):
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))


def line(file, text="a dog"):
    return json.dumps({"file_name": file, "text": text})


def test_captions_come_from_the_metadata_in_its_order(tmp_path):
    for name in ("a.png", "b.png", "unnamed.png", "sub/c.jpg"):
        write_picture(tmp_path / name)
    metadata(tmp_path, line("sub/c.jpg"), line("a.png", "one"), line("a.png", "two"))
    assert read_examples(tmp_path) == [
        Example(tmp_path / "sub/c.jpg", "a dog"),
        Example(tmp_path / "a.png", "one"),
        Example(tmp_path / "a.png", "two"),
    ]


def test_a_plain_folder_shares_one_prompt(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        write_picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    examples = read_examples(tmp_path, "a <v1> dog")
    assert [example.file.name for example in examples] == ["a.JPG", "b.png", "c.webp"]
    assert {example.text for example in examples} == {"a <v1> dog"}


def test_folders_that_say_nothing_or_too_much_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none is no folder: expected one of pictures"):
        read_examples(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no pictures \(.bmp, .jpeg"):
        read_examples(tmp_path, "a dog")
    write_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"has no metadata.jsonl, and no prompt is given"):
        read_examples(tmp_path)
    metadata(tmp_path, line("a.png"))
    with pytest.raises(ValueError, match=r"has a metadata.jsonl, and a prompt is given"):
        read_examples(tmp_path, "a dog")
    metadata(tmp_path)
    with pytest.raises(ValueError, match=r"has no pictures"):
        read_examples(tmp_path)


def test_blank_lines_are_nothing(tmp_path):
    write_picture(tmp_path / "a.png")
    metadata(tmp_path, "", line("a.png"), "  ")
    assert read_examples(tmp_path) == [Example(tmp_path / "a.png", "a dog")]


def test_all_bad_lines_are_reported_together(tmp_path):
    metadata(tmp_path, "{oops", line("a.png"), '{"file_name": "a.png"}', "[1]", line("a.png", 3))
    with pytest.raises(ValueError, match=r"metadata.jsonl: line 1 is .*line 3 .*line 4 .*line 5 "):
        read_examples(tmp_path)


def test_all_bad_files_are_reported_together(tmp_path):
    write_picture(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    whole = write_picture(tmp_path / "cut.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    metadata(tmp_path, *(line(f"{name}.png") for name in ("good", "text", "cut", "gone")))
    with pytest.raises(
        ValueError, match=r"text.png is damaged or no .*cut.png is damaged .*gone.png is missing"
    ):
        read_examples(tmp_path)


def test_a_picture_of_the_right_size_is_itself(tmp_path):
    file = write_picture(tmp_path / "a.png")
    loaded = load_picture(file, SIDE)
    assert loaded.shape == (3, SIDE, SIDE)
    with Image.open(file) as stored:
        assert ((loaded + 1) * 127.5).round()[:, 2, 5].tolist() == list(stored.getpixel((5, 2)))


@pytest.mark.parametrize("side", [8, 16, 32])
def test_other_pictures_are_cut_to_their_middle_square(tmp_path, side):
    page = Image.new("RGB", (32, 16), "red")
    page.paste("blue", (2, 0, 30, 16))
    page.save(tmp_path / "wide.png")
    blue = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, side, side)
    torch.testing.assert_close(load_picture(tmp_path / "wide.png", side), blue)


def test_what_is_transparent_is_white_and_what_lies_on_its_side_is_turned(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_picture(tmp_path / "clear.png", 8) == 1).all()
    lying = Image.new("RGB", (8, 8), "white")
    lying.paste("black", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    lying.save(tmp_path / "lying.png", exif=exif)
    rows = load_picture(tmp_path / "lying.png", 8).mean((0, 2))
    assert rows.tolist() == [-1] * 4 + [1] * 4


def dotted(side=33):
    """White, with a black square of 5 in the middle."""
    page = torch.ones(3, side, side)
    page[:, side // 2 - 2 : side // 2 + 3, side // 2 - 2 : side // 2 + 3] = -1
    return page


def centre(page):
    ink = (1 - page[0]) / 2
    places = torch.arange(len(ink)) - len(ink) // 2
    return float((ink.sum(0) * places).sum() / ink.sum()), float(ink.sum())


def test_no_jitter_changes_nothing_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(Jitter()(dotted(), generator), dotted())
    assert torch.equal(generator.get_state(), before)


def test_jitter_moves_and_shrinks_within_its_bounds_and_keeps_a_white_page_white():
    jitter = Jitter(shift=0.2, shrink=0.5)
    moves, inks = [], []
    for seed in range(200):
        page = jitter(dotted(), torch.Generator().manual_seed(seed))
        torch.testing.assert_close(page[:, 0], torch.ones(3, 33))
        move, ink = centre(page)
        moves.append(move / 33)
        inks.append(ink / 25)
    assert -0.21 < min(moves) < -0.18 and 0.18 < max(moves) < 0.21
    assert 0.2 < min(inks) < 0.3 and 0.95 < max(inks) < 1.05
    again = [jitter(dotted(), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)


def test_impossible_jitter_is_refused():
    with pytest.raises(ValueError, match=r"shift is 1, expected 0 .*shrink is 2, expected 0 <"):
        Jitter(shift=1, shrink=2)


def test_datasets_reads_the_same_folder(tmp_path):
    folder = write_examples(tmp_path / "data", ["one", "two"])
    metadata(folder, line("1.png", "two"), line("0.png", "one"), line("0.png", "again"))
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(found["text"]) == sorted(example.text for example in read_examples(folder))
