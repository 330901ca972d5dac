"""Pipelines tell gates the time step and the prompt without being told to."""

import math

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from dreambooth.adapter import blocks
from dreambooth.conditioning import unet_features
from mole_vl import mix, save_gates
from mole_vl.arms import together
from mole_vl.gates import Free, MoLE, Sum
from pipelines import Switch
from pipelines.recipe import gates_digest
from tests.pipelines.toys import (
    READING,
    TEXT,
    differ,
    draw,
    loras,
    parts_of,
    quiet,
    randomise,
    same,
    sd1,
    sdxl,
)

FREE = MoLE(score=Free())
STEPS = 1000


def trained(model, experts, gate, features):
    """A model mixed with gates that say something."""
    mixture = mix(model, experts, gate=gate, blocks=blocks(model), features=features)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixture.gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise))
    return mixture


def gated(folder, base=sd1, words=("time",), gate=FREE):
    """A pipeline with gates from a file."""
    pipe = base()
    parts = loras(pipe, parts_of(pipe))
    unet = base().unet
    features = unet_features(unet, words, STEPS)
    mixture = trained(unet, [part["unet"] for part in parts], gate, features)
    save_gates(mixture, folder / "unet.safetensors")
    pipe.load_experts(parts)
    pipe.load_gates(folder)
    return pipe


def waves_of(step):
    angles = [math.pi * wave * float(step) / STEPS for wave in range(1, 9)]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])


def heun(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("sampler", [lambda pipe: pipe, heun], ids=["ddim", "heun"])
def test_recorded_weights_are_those_of_the_steps_that_the_unet_was_told(tmp_path, sampler):
    pipe = sampler(gated(tmp_path))
    mixture, steps = pipe.mixtures["unet"], []
    pipe.unet.register_forward_pre_hook(lambda _unet, args: steps.append(args[1]))
    with pipe.record() as weights:
        draw(pipe, ["a cat", "a dog"], (1, 2))
    assert len(steps) == (5 if sampler is heun else 3)
    found = weights["unet"]
    for site, by_call in zip(found.sites, found.weights, strict=True):
        gate = mixture.gate(site)
        for step, own in zip(steps, by_call, strict=True):
            logits = gate.score.logits + gate.conditioning.weight @ waves_of(step)
            torch.testing.assert_close(own, gate.normaliser(logits), atol=1e-4, rtol=1e-4)
        assert by_call.std(0).max() > 0.01


@pytest.mark.parametrize("base", [sd1, sdxl])
@pytest.mark.parametrize("gate", [FREE, READING])
def test_a_batch_of_prompts_equals_single_ones_and_a_saved_pipeline_itself(tmp_path, base, gate):
    pipe = gated(tmp_path, base, ("time", "prompt"), gate)
    prompts = ["a cat", "the red dog"]
    both = draw(pipe, prompts, (1, 2))
    for index, prompt in enumerate(prompts):
        same(draw(pipe, prompt, (index + 1,)), both[index : index + 1])
    pipe.save_pretrained(tmp_path / "pipe")
    again = quiet(type(pipe).from_pretrained(tmp_path / "pipe"))
    assert again.mixtures["unet"].features.name == "time+prompt"
    same(draw(again, prompts, (1, 2)), both)
    differ(draw(again, prompts, (1, 2), guidance="own"), both)


def test_the_prompt_of_a_picture_says_its_weights(tmp_path):
    pipe = gated(tmp_path, words=("prompt",))
    with pipe.record() as weights:
        draw(pipe, "a cat")
        draw(pipe, "the red dog", negative_prompt="blue")
        draw(pipe, "the red dog", guidance_scale=1.0)
    calls = weights["unet"].weights
    torch.testing.assert_close(calls[:, 0], calls[:, 2])
    torch.testing.assert_close(calls[:, 3], calls[:, 8])
    assert (calls[:, 0] - calls[:, 3]).abs().max() > 0.01


def test_given_weights_and_compositions_need_no_features(tmp_path):
    pipe, plain = gated(tmp_path), sd1()
    plain.load_experts(loras(plain, TEXT), gate=Sum())
    for options in ({"weights": {"ann": 0.5}}, {"mixing": Switch(every=1)}):
        with together([p.mixtures["text_encoder"].disabled() for p in (pipe, plain)]):
            same(draw(pipe, **options), draw(plain, **options))


def test_an_export_takes_the_recorded_mean(tmp_path):
    pipe = gated(tmp_path)
    with pytest.raises(ValueError, match="the gates of unet read time, so their weights vary"):
        pipe.export(tmp_path / "one")
    with pipe.record() as weights:
        draw(pipe)
    assert max(pipe.export(tmp_path / "one", weights=weights).values()) < 1e-5
    again = sd1()
    again.load_experts([tmp_path / "one"], gate=Sum())
    with together([mixture.pinned(weights.mean(p)) for p, mixture in pipe.mixtures.items()]):
        same(draw(again), draw(pipe))


def test_the_digest_of_gates_knows_their_features(tmp_path):
    one = gated(tmp_path).mixtures["unet"]
    pipe = sd1()
    pipe.load_experts(loras(pipe), gate=FREE)
    plain = pipe.mixtures["unet"]
    assert gates_digest(one) != gates_digest(plain)
    assert gates_digest(one) == gates_digest(gated(tmp_path).mixtures["unet"])


class Foreign:
    name, width, held = "weather", 4, False

    def __call__(self, args, kwargs):
        return torch.zeros(2, 4)


def test_files_with_features_of_others_are_refused_and_change_nothing(tmp_path):
    pipe = sd1()
    parts, text = loras(pipe, TEXT), sd1().text_encoder
    pipe.load_experts(parts, gate=READING)
    expected = draw(randomise(pipe))
    mixture = trained(text, [part["text_encoder"] for part in parts], READING, Foreign())
    save_gates(mixture, tmp_path / "text_encoder.safetensors")
    with pytest.raises(ValueError, match=r"text_encoder.safetensors: features: .*'weather'"):
        pipe.load_gates(tmp_path)
    assert torch.equal(draw(pipe), expected)
