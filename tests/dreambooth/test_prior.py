"""Prior preservation: the loss, and where the class pictures come from."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dreambooth.base import Base
from dreambooth.class_pictures import PriorConfig, class_examples, draw_class
from dreambooth.data import read_examples
from dreambooth.denoise import DenoiseConfig, DenoiseTask, Prior
from dreambooth.train_lora import main
from mole_vl.training import Row
from tests.dreambooth.kinds import DRAW, candidates, write_kind
from tests.dreambooth.toys import SIDE, write_examples, write_picture


@pytest.fixture
def base(tmp_path):
    return Base.load(write_kind(tmp_path / "base", "sd2"))


def rows(count):
    return [Row(0, 0, index, count) for index in range(count)]


def test_the_class_is_a_term_beside_the_pictures_own(tmp_path, base):
    own = read_examples(write_examples(tmp_path / "own", ["a v dog", "v dog"]))
    others = read_examples(write_examples(tmp_path / "class", ["a dog"] * 3))
    config = DenoiseConfig(resolution=SIDE)
    with_prior = DenoiseTask(base, own, {}, config, Prior(others, 0.3))
    alone, of_class = (DenoiseTask(base, some, {}, config) for some in (own, others))
    for task in (with_prior, alone, of_class):
        task.place(torch.device("cpu"))
    batch = with_prior.batch(rows(4))
    terms = with_prior.losses(batch)
    torch.testing.assert_close(
        terms["denoise"].value, alone.losses(alone.batch(rows(4)))["denoise"].value
    )
    assert (terms["denoise"].weight, terms["prior"].weight) == (1.0, 0.3)
    assert with_prior.units(batch) == 4 and list(batch.captions[4:]) == ["a dog"] * 4
    # The class by hand: its rows are the batch's last.
    latents = base.encode(batch.pictures[4:], batch.posterior[4:])
    steps, noise = batch.timesteps[4:], batch.noise[4:]
    noisy = base.noising.add_noise(latents, noise, steps)
    output = base.unet(noisy, steps, base.encode_prompts(["a dog"] * 4).states).sample
    expected = F.mse_loss(output, base.noising.target(latents, noise, steps))
    torch.testing.assert_close(terms["prior"].value, expected)
    assert not torch.equal(batch.noise[:4], noise)


def prior(folder, **changes):
    return PriorConfig(**{"prompt": "a dog", "pictures": folder, "count": 3, **changes})


def drawn(base, settings, draw=DRAW):
    draw_class(base, settings, SIDE, draw)
    return [example.file for example in class_examples(settings)]


def pixels(file):
    with Image.open(file) as picture:
        return picture.tobytes()


def test_what_is_missing_is_drawn_and_broken_off_goes_on(tmp_path, base):
    whole = drawn(base, prior(tmp_path / "whole"))
    assert [file.name for file in whole] == [f"drawn-0000{index}.png" for index in range(3)]
    assert len({pixels(file) for file in whole}) == 3
    broken = drawn(base, prior(tmp_path / "broken"))
    broken[1].unlink()
    stamps = [broken[index].stat().st_mtime_ns for index in (0, 2)]
    again = drawn(base, prior(tmp_path / "broken"))
    assert [broken[index].stat().st_mtime_ns for index in (0, 2)] == stamps
    assert list(map(pixels, again)) == list(map(pixels, whole))
    assert len(drawn(base, prior(tmp_path / "broken", count=2))) == 2


def test_a_persons_own_class_pictures_count(tmp_path, base):
    for index in range(2):
        write_picture(tmp_path / "mine" / f"{index}.jpg", seed=index)
    files = drawn(base, prior(tmp_path / "mine"))
    assert [file.name for file in files] == ["0.jpg", "1.jpg", "drawn-00000.png"]
    assert len(drawn(base, prior(tmp_path / "mine", count=0))) == 2


def test_pictures_drawn_otherwise_are_not_taken_for_these(tmp_path, base):
    drawn(base, prior(tmp_path / "class"))
    with pytest.raises(ValueError, match=r"another folder, or remove them.*prompt was 'a dog', is"):
        drawn(base, prior(tmp_path / "class", prompt="a cat", count=4))


def test_training_with_a_prior_logs_it_apart_and_depends_on_it(tmp_path):
    without = candidates(tmp_path, "sdxl", output="without")
    main(without)
    main(candidates(tmp_path, "sdxl", output="with", prior=prior(tmp_path / "class", weight=0.5)))
    lines = (tmp_path / "runs-with" / "dog" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    lines = (tmp_path / "runs-without" / "dog" / "metrics.jsonl").read_text().splitlines()
    bare = [json.loads(line) for line in lines]
    assert logged[0]["denoise"] == pytest.approx(bare[0]["denoise"], rel=1e-4)
    assert logged[-1]["denoise"] != pytest.approx(bare[-1]["denoise"], rel=1e-6)
    assert all(line["prior"] > 0 for line in logged) and "prior" not in bare[0]


def test_all_faults_of_a_prior_come_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"prompt is empty.*count is -1.*weight is 0"):
        prior(tmp_path, prompt=" ", count=-1, weight=0)
    one = candidates(tmp_path, "sd1", prior=prior(tmp_path / "class"))
    two = candidates(tmp_path, "sd1", name="cat", prior=prior(tmp_path / "class", prompt="a cat"))
    with pytest.raises(ValueError, match="class pictures' folder of 'a cat' and 'a dog', expected"):
        type(one)(**{**vars(one), "candidates": (*one.candidates, *two.candidates)})
