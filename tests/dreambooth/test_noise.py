import pytest
import torch
from diffusers import DDPMScheduler

from dreambooth.noise import Noising

PREDICTIONS = ("epsilon", "v_prediction")


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 5, 4, 3, 3, generator=generator, dtype=torch.float64)
    return clean, noise, torch.tensor([0, 1, 500, 900, 999])


def noising(prediction, **settings):
    return Noising(DDPMScheduler(**settings).alphas_cumprod, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_and_target_are_those_of_diffusers(prediction):
    clean, noise, steps = drawn()
    scheduler, ours = DDPMScheduler(), noising(prediction)
    assert ours.steps == 1000
    expected = scheduler.add_noise(clean, noise, steps)
    torch.testing.assert_close(ours.add_noise(clean, noise, steps), expected, atol=1e-6, rtol=1e-6)
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, steps)
    torch.testing.assert_close(ours.target(clean, noise, steps), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("prediction", "settings"),
    [("epsilon", {}), ("v_prediction", {}), ("v_prediction", {"rescale_betas_zero_snr": True})],
)
def test_clean_latents_follow_exactly_from_the_true_output(prediction, settings):
    clean, noise, steps = drawn()
    ours = noising(prediction, **settings)
    noisy = ours.add_noise(clean, noise, steps)
    found = ours.clean(noisy, ours.target(clean, noise, steps), steps)
    # The levels are stored in fp32; at the last of them the signal is 1/160 of the noise.
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_gradient_flows_through_clean_latents(prediction):
    clean, noise, steps = drawn()
    ours = noising(prediction)
    output = noise.clone().requires_grad_()
    ours.clean(clean, output, steps).sum().backward()
    assert (output.grad != 0).all()


def test_timesteps_cover_all_levels_and_no_more():
    ours = Noising(torch.linspace(0.9, 0.1, 4), "epsilon")
    generator = torch.Generator().manual_seed(0)
    assert {int(ours.draw_timestep(generator)) for _ in range(200)} == {0, 1, 2, 3}


def test_bases_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="prediction is 'sample', expected one of epsilon, v_"):
        noising("sample")
    with pytest.raises(ValueError, match="epsilon says nothing about latents at zero signal"):
        noising("epsilon", rescale_betas_zero_snr=True)
