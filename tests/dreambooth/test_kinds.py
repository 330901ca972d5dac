"""SD 1, SD 2 and SDXL: prompts, sizes and samples as diffusers has them."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torchvision.transforms.v2.functional import resize

from dreambooth.adapter import blocks, positive_rows
from dreambooth.base import Base
from dreambooth.data import Example, load_picture
from dreambooth.denoise import DenoiseConfig, DenoiseTask
from dreambooth.drawing import draw
from dreambooth.frames import Frame, middle_square, whole
from dreambooth.sampling import guided, sample, schedule
from mole_vl import mix
from mole_vl.gates import Hidden, MoLE
from mole_vl.training import Row
from tests.dreambooth.kinds import DRAW, KINDS, plain, reload, write_kind
from tests.dreambooth.toys import SIDE, write_picture
from tests.pipelines.toys import lora
from tests.toys import randomise

PROMPTS = ["a dog", "", "red cat"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def base(kind, tmp_path):
    return Base.load(write_kind(tmp_path / "base", kind))


@pytest.fixture
def xl(tmp_path):
    return Base.load(write_kind(tmp_path / "xl", "sdxl"))


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(base, kind, tmp_path):
    pipe = reload(kind, tmp_path / "base")
    states, _, *pooled = pipe.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    found = base.encode_prompts(PROMPTS)
    torch.testing.assert_close(found.states, states)
    assert (found.pooled is None) == (kind != "sdxl")
    if pooled:
        torch.testing.assert_close(found.pooled, pooled[0])


def test_a_sample_is_the_pipelines(base, kind, tmp_path):
    pipe = reload(kind, tmp_path / "base")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(2, *base.latent_shape(SIDE))
    expected = pipe(
        ["a dog", "owl"], negative_prompt=["", "bad"], latents=noise, num_inference_steps=3,
        guidance_scale=2.5, output_type="latent", height=SIDE, width=SIDE,
    ).images  # fmt: skip
    with torch.no_grad():
        states = base.encode_prompts(["", "bad", "a dog", "owl"])
    found = sample(base, noise, states, schedule(base, 3), 2.5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_drawing_is_the_same_whatever_is_drawn_beside_it(base):
    together = list(draw(base, PROMPTS, [3, 4, 5], SIDE, DRAW))
    (alone,) = draw(base, PROMPTS[2:], [5], SIDE, DRAW)
    torch.testing.assert_close(together[2], alone, atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2


@torch.no_grad()
def test_sizes_and_cuts_reach_the_unet_as_diffusers_training_script_gives_them(xl):
    pipe, noisy = plain("sdxl"), torch.randn(2, *xl.latent_shape(SIDE))
    frames = [Frame((64, 48), (3, 0), (16, 16)), whole(1023, 16)]
    prompts, step = xl.encode_prompts(["a dog", "owl"]), torch.tensor([3, 900])
    rows = []
    for index, (original, corner, target) in enumerate(
        (((64, 48), (3, 0), (16, 16)), ((1023, 16), (0, 0), (1023, 16)))
    ):
        ids = pipe._get_add_time_ids(
            original, corner, target, torch.float32, text_encoder_projection_dim=6
        )
        added = {"text_embeds": prompts.pooled[index : index + 1], "time_ids": ids}
        one = slice(index, index + 1)
        states = prompts.states[one]
        rows.append(xl.unet(noisy[one], step[one], states, added_cond_kwargs=added).sample)
    found = xl.predict(noisy, step, prompts, frames)
    torch.testing.assert_close(found, torch.cat(rows))
    assert (found - xl.predict(noisy, step, prompts)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (17, 17), (9, 31)])
def test_the_cut_is_where_resizing_and_cropping_the_middle_leaves_it(tmp_path, size):
    file = write_picture(tmp_path / "picture.png", size=size)
    frame = middle_square(file, SIDE)
    resized = resize(torch.zeros(3, size[1], size[0]), [SIDE])
    middle = tuple((side - SIDE) / 2 for side in resized.shape[1:])
    assert frame.original == (size[1], size[0]) and frame.target == (SIDE, SIDE)
    assert all(abs(a - b) <= 1 for a, b in zip(frame.corner, middle, strict=True))


def test_a_turned_pictures_size_is_that_of_what_is_shown(tmp_path):
    file = write_picture(tmp_path / "picture.jpg", size=(40, 24))
    assert middle_square(file, SIDE).original == (24, 40)
    with Image.open(file) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(tmp_path / "turned.jpg", exif=exif)
    assert middle_square(tmp_path / "turned.jpg", SIDE).original == (40, 24)
    assert load_picture(tmp_path / "turned.jpg", SIDE).shape == (3, SIDE, SIDE)


def test_guidance_on_sdxl_serves_both_rows_of_a_picture_with_its_gates(xl):
    experts = [lora(xl.unet, name, seed) for seed, name in enumerate(("owl", "ink"))]
    found = blocks(xl.unet)
    mixture = mix(xl.unet, experts, gate=MoLE(score=Hidden()), site="block", blocks=found)
    randomise(mixture)
    latents, step = torch.randn(2, *xl.latent_shape(SIDE)), torch.tensor(300)
    with torch.no_grad():
        prompts = xl.encode_prompts(["", "", "a dog", "owl"])
        with mixture.condition(source=positive_rows(2)):
            together = guided(xl, latents, step, prompts, 3.0)
        with mixture.record() as records:
            positive = xl.predict(latents, step, prompts[2:])
        with mixture.pinned({r.site: r.output.weights for r in records}):
            negative = xl.predict(latents, step, prompts[:2])
    expected = negative + 3 * (positive - negative)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_vae_stays_out_of_fp16(xl):
    pictures = torch.rand(1, 3, SIDE, SIDE)
    expected = xl.encode(pictures)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(xl.encode(pictures), expected)
        assert torch.equal(xl.decode(expected), xl.decode(expected).float())
    half = Base.load(xl.name, torch.float16)
    assert half.vae.dtype == torch.float32 and half.unet.dtype == torch.float16


def test_bases_of_other_conditions_are_refused(tmp_path):
    pipe = plain("sdxl")
    pipe.save_pretrained(tmp_path / "base")
    config = {**pipe.unet.config, "projection_class_embeddings_input_dim": 20}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "base" / "unet")
    with pytest.raises(ValueError, match="further conditions of width 20, expected 18: the prom"):
        Base.load(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"'red(_red)+' has \d+ tokens|'reddd.*' has 17 tokens"):
        Base.load(write_kind(tmp_path / "xl", "sdxl")).check_prompts(["a", "reddddddddddddd"])


@torch.no_grad()
def test_sdxl_learns_each_picture_with_its_own_size_and_cut(tmp_path, xl):
    sizes = {"wide": (40, 24), "tall": (16, 33)}
    for seed, (name, size) in enumerate(sizes.items()):
        write_picture(tmp_path / "data" / f"{name}.png", seed=seed, size=size)
    examples = [Example(tmp_path / "data" / f"{name}.png", name) for name in sizes]
    task = DenoiseTask(xl, examples, {}, DenoiseConfig(resolution=SIDE))
    task.place(torch.device("cpu"))
    batch = task.batch([Row(0, 0, index, 3) for index in range(3)])
    # Of the wide one 80/3 columns are left of 16 rows, of the tall one 33 rows of 16 columns.
    known = {"wide": (24, 40, 0, 5, 16, 16), "tall": (33, 16, 8, 0, 16, 16)}
    pipe, losses = plain("sdxl"), []
    for index, caption in enumerate(batch.captions):
        ids, one = known[caption], slice(index, index + 1)
        times = pipe._get_add_time_ids(ids[:2], ids[2:4], ids[4:], torch.float32, 6)
        prompts = xl.encode_prompts([caption])
        latents = xl.encode(batch.pictures[one], batch.posterior[one])
        step, noise = batch.timesteps[one], batch.noise[one]
        output = xl.unet(
            xl.noising.add_noise(latents, noise, step),
            step,
            prompts.states,
            added_cond_kwargs={"text_embeds": prompts.pooled, "time_ids": times},
        ).sample
        losses.append((output - noise).square().mean())
    torch.testing.assert_close(task.losses(batch)["denoise"].value, torch.stack(losses).mean())
