import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth.base import Base
from dreambooth.data import Jitter, load_picture, read_examples
from dreambooth.denoise import DenoiseConfig, DenoiseTask
from mole_vl.training import Row
from tests.dreambooth.toys import SIDE, write_base, write_examples

CPU = torch.device("cpu")


@pytest.fixture(params=["epsilon", "v_prediction"])
def base(request, tmp_path):
    return Base.load(write_base(tmp_path / "base", request.param))


@pytest.fixture
def examples(tmp_path):
    return read_examples(write_examples(tmp_path / "data", ["a dog", "a cat", "red"]))


def task(base, examples, **settings):
    task = DenoiseTask(base, examples, {}, DenoiseConfig(resolution=SIDE, **settings))
    task.place(CPU)
    return task


def rows(count, step=0):
    return [Row(0, step, index, count) for index in range(count)]


@torch.no_grad()
def test_the_loss_is_the_naive_one_row_by_row(base, examples):
    ours = task(base, examples)
    batch = ours.batch(rows(4))
    scheduler = DDPMScheduler.from_config(base_config(base))
    files = {example.text: example.file for example in examples}
    losses = []
    for index, text in enumerate(batch.captions):
        picture = load_picture(files[text], SIDE)[None]
        posterior = base.vae.encode(picture).latent_dist
        latents = 0.7 * (posterior.mean + posterior.std * batch.posterior[index])
        noise, step = batch.noise[index : index + 1], batch.timesteps[index : index + 1]
        ids = base.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        output = base.unet(
            scheduler.add_noise(latents, noise, step), step, base.text_encoder(ids)[0]
        ).sample
        v = base.noising.prediction == "v_prediction"
        target = scheduler.get_velocity(latents, noise, step) if v else noise
        losses.append((output - target).square().mean())
    term = ours.losses(batch)["denoise"]
    torch.testing.assert_close(term.value, torch.stack(losses).mean())
    assert term.per_unit and ours.units(batch) == 4


def base_config(base):
    return DDPMScheduler.load_config(base.name, subfolder="scheduler")


def test_a_row_is_the_same_row_whatever_lies_beside_it(base, examples):
    ours = task(base, examples, jitter=Jitter(shift=0.1, shrink=0.8), caption_dropout=0.5)
    whole, alone = ours.batch(rows(4)), ours.batch(rows(4)[2:3])
    assert whole.captions[2] == alone.captions[0]
    for name in ("pictures", "posterior", "noise", "timesteps"):
        assert torch.equal(getattr(whole, name)[2:3], getattr(alone, name))
    assert not torch.equal(ours.batch(rows(4, step=1)).noise, whole.noise)
    assert not torch.equal(whole.noise, whole.posterior)


def test_captions_are_dropped_as_often_as_asked(base, examples):
    for share, low, high in ((0.0, 0, 0), (0.3, 12, 28), (1.0, 64, 64)):
        batch = task(base, examples, caption_dropout=share).batch(rows(64))
        assert low <= batch.captions.count("") <= high


def test_a_resolution_between_latents_is_refused(base, examples):
    with pytest.raises(ValueError, match="resolution is 17, expected a multiple of 2"):
        DenoiseTask(base, examples, {}, DenoiseConfig(resolution=17))
    with pytest.raises(ValueError, match=r"resolution is 0.*caption_dropout is 2, expected 0 to 1"):
        DenoiseConfig(resolution=0, caption_dropout=2)
