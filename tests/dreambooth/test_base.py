import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel

from dreambooth.base import Base
from tests.dreambooth.toys import LENGTH, SIDE, tiny_pipeline, write_base

PROMPTS = ["a dog", "", "red cat"]


@pytest.fixture
def pipeline(tmp_path):
    pipeline = tiny_pipeline("v_prediction")
    pipeline.save_pretrained(tmp_path / "base")
    return pipeline


@pytest.fixture
def base(pipeline, tmp_path):
    return Base.load(str(tmp_path / "base"))


def test_a_base_is_read_whole_and_frozen(base):
    assert base.noising.prediction == "v_prediction"
    assert base.noising.alphas_cumprod[-1] == 0
    assert base.downscale == 2
    assert base.latent_shape(SIDE) == (4, SIDE // 2, SIDE // 2)
    for part in (base.unet, base.text_encoder, base.vae):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_prompts_are_encoded_as_the_pipeline_does(base, pipeline):
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    found = base.encode_prompts(PROMPTS)
    assert found.states.shape == (3, LENGTH, 12) and found.pooled is None
    torch.testing.assert_close(found.states, expected)


def test_a_prompt_that_is_too_long_is_named_and_not_cut(base):
    with pytest.raises(ValueError, match=r"'abcdefghijkl' has 14 tokens, expected at most 12"):
        base.encode_prompts(["a dog", "abcdefghijkl"])


def test_latents_are_scaled_and_a_sample_lies_around_the_mean(base):
    pictures = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    posterior = base.vae.encode(pictures).latent_dist
    torch.testing.assert_close(base.encode(pictures), 0.7 * posterior.mean)
    noise = torch.randn(2, *base.latent_shape(SIDE))
    expected = 0.7 * (posterior.mean + posterior.std * noise)
    torch.testing.assert_close(base.encode(pictures, noise), expected)


def test_decoding_undoes_the_scale_and_keeps_the_gradient(base):
    latents = torch.randn(2, *base.latent_shape(SIDE)).requires_grad_()
    pictures = base.decode(latents)
    torch.testing.assert_close(pictures, base.vae.decode(latents / 0.7).sample)
    pictures.square().sum().backward()
    assert latents.grad.abs().sum() > 0


def test_the_output_is_the_unets(base):
    noisy, states = torch.randn(3, *base.latent_shape(SIDE)), base.encode_prompts(PROMPTS)
    steps = torch.tensor([3, 500, 999])
    expected = base.unet(noisy, steps, encoder_hidden_states=states.states).sample
    torch.testing.assert_close(base.predict(noisy, steps, states), expected)


def test_what_is_no_base_is_refused(tmp_path):
    for name in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no model_index.json: expected a Stable"):
            Base.load(str(name))


def test_an_inpainting_base_is_refused(tmp_path):
    folder = tmp_path / "base"
    write_base(folder)
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="its UNet reads 9 channels and its VAE gives 4"):
        Base.load(str(folder))
