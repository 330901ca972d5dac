"""A UNet's gates are told the time step and the prompt, by the UNet's own arguments."""

import copy
import math
import pickle

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.nn import functional as F

from dreambooth.adapter import blocks, positive_rows
from dreambooth.base import Base
from dreambooth.clip_task import ClipLoss
from dreambooth.conditioning import features_of_file, unet_features
from dreambooth.pairs import Pair, Pairs
from dreambooth.sampling import guided
from dreambooth.subject_style import SubjectStyle
from mole_vl import mix, mix_from, read_gates, save_gates
from mole_vl.domain import prepare
from mole_vl.gates import Free, Hidden, MoLE, Sigmoid, Sum
from mole_vl.training import FitConfig, Stop, fit
from tests.dreambooth.test_clip_task import experts, write_clip
from tests.dreambooth.toys import SIDE, tiny_pipeline, write_base, write_examples
from tests.mole_vl.test_passes import checkpointing, tiny_unet
from tests.toys import SITES, randomise

BOTH = ["time", "prompt"]
STEPS = 1000


def told(unet, words=BOTH):
    features = unet_features(unet, words, STEPS)
    assert features is not None
    return features


def waves_of(step):
    angles = [math.pi * wave * step / STEPS for wave in range(1, 9)]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])


def pooled_of(states):
    mean = torch.stack([F.normalize(position, dim=-1) for position in states]).mean(0)
    return mean / mean.square().mean().sqrt()


@pytest.mark.parametrize("words", [["time"], ["prompt"], BOTH, BOTH[::-1]])
def test_features_are_read_however_the_unet_is_called(words):
    features = told(tiny_unet()[0], words)
    assert features.name == {1: words[0], 2: "time+prompt"}[len(words)]
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)

    def expected(*steps):
        parts = {
            "time": torch.stack([waves_of(step) for step in steps]),
            "prompt": torch.stack([pooled_of(row) for row in states]),
        }
        found = torch.cat([parts[word] for word in BOTH if word in words], -1)
        assert found.shape[1] == features.width
        return found

    for step in (300, 300.0, torch.tensor(300), torch.tensor([300]), torch.tensor([300, 300])):
        found = features((x, step, states), {"return_dict": False})
        torch.testing.assert_close(found, expected(300, 300), atol=1e-5, rtol=1e-5)
    by_name = {"encoder_hidden_states": states, "timestep": torch.tensor([30, 700]), "sample": x}
    torch.testing.assert_close(features((), by_name), expected(30, 700), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="missing a required argument: 'timestep'"):
        features((x,), {})
    assert pickle.loads(pickle.dumps(features)) == copy.deepcopy(features) == features


def test_positions_that_the_unet_is_told_to_pass_over_do_not_count():
    features = told(tiny_unet()[0], ["prompt"])
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    states[0, 3:] = math.inf
    found = features((x, 3, states), {"encoder_attention_mask": mask})
    expected = torch.stack([pooled_of(states[0, :3]), pooled_of(states[1])])
    torch.testing.assert_close(found, expected)


def conditioned(gate, words=BOTH, site=SITES[2]):
    unet, found, _, call = tiny_unet()
    mixture = mix(unet, experts(unet), gate=gate, **site, blocks=found, features=told(unet, words))
    return unet, mixture, call


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("score", [Hidden(), Free()])
def test_two_forwards_then_one_backward_with_and_without_checkpointing(site, score):
    unet, mixture, call = conditioned(MoLE(score=score, normaliser=Sigmoid()), site=site)
    randomise(mixture)
    found = []
    for on in (False, True):
        checkpointing(unet, on)
        with mixture.record() as first:
            one = call(0)
        with mixture.record() as second:
            two = call(1)
        assert len(first) == len(second) == len(mixture.sites)
        loss = one.square().mean() + two.square().mean()
        found.append(torch.autograd.grad(loss, list(mixture.parameters())))
    assert all(grad.abs().sum() > 0 for grad in found[0] if grad.dim() > 0)
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("words", [["time"], ["prompt"]])
def test_logits_are_the_naive_ones_and_weights_follow_what_is_told_alone(words):
    unet, mixture, call = conditioned(MoLE(score=Free()), words)
    before = call(0)
    with mixture.pinned([0.5, 0.5]):
        torch.testing.assert_close(call(0), before)
    randomise(mixture)
    states = torch.randn(3, 5, 12)
    with mixture.record() as records:
        unet(torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), states)
    read = {
        "time": torch.stack([waves_of(step) for step in (0, 400, 999)]),
        "prompt": torch.stack([pooled_of(row) for row in states]),
    }[words[0]]
    for record in records:
        gate = mixture.gate(record.site)
        expected = gate.score.logits + read @ gate.conditioning.weight.T
        torch.testing.assert_close(record.output.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("score", [Hidden(), Free()])
def test_guidance_in_one_batch_equals_two_passes_under_the_same_weights(tmp_path, score):
    base = Base.load(write_base(tmp_path / "base", "v_prediction"))
    mixture = mix(
        base.unet,
        experts(base.unet),
        gate=MoLE(score=score),
        blocks=blocks(base.unet),
        features=told(base.unet),
    )
    randomise(mixture)
    latents, step = torch.randn(2, *base.latent_shape(SIDE)), torch.tensor(300)
    states = base.encode_prompts(["bad"] * 2 + ["a dog", "an owl"])
    with torch.no_grad():
        with mixture.condition(source=positive_rows(2)):
            together = guided(base, latents, step, states, 3.0)
        with mixture.record() as records:
            positive = base.predict(latents, step, states[2:])
        with mixture.pinned({r.site: r.output.weights for r in records}):
            negative = base.predict(latents, step, states[:2])
    expected = negative + 3 * (positive - negative)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def given(tmp_path):
    base = Base.load(write_base(tmp_path / "base", "v_prediction"))
    experts(base.unet, tmp_path / "loras")
    return {
        "base": base.name,
        "ordinary": write_examples(tmp_path / "ordinary", ["a thing"] * 4),
        "clip": write_clip(tmp_path / "clip"),
        "pictures": {
            name: write_examples(tmp_path / name, [f"a {name}"]) for name in ("owl", "ink")
        },
        "resolution": SIDE,
        "loss": ClipLoss(steps=2, guidance=2.0, views=1),
        "drawn": 2,
    }


def subject_style(tmp_path, given, **settings):
    loras = [tmp_path / "loras/owl", tmp_path / "loras/ink"]
    told = {"prompt": "an owl in ink", "caption": "an owl in ink style"}
    return SubjectStyle(experts=loras, **told, **given, **settings)


def pair(tmp_path, given, **settings):
    loras = {"subject": tmp_path / "loras/owl", "style": tmp_path / "loras/ink"}
    both = [
        Pair(experts=loras, prompt=f"{word} owl in ink", caption=f"{word} owl in ink style")
        for word in ("an", "no")
    ]
    return Pairs(pairs=both, **given, **settings)


@pytest.mark.parametrize("build", [subject_style, pair])
def test_the_whole_way_from_training_to_a_report(tmp_path, given, build):
    domain = build(tmp_path, given, conditioning=BOTH)
    run = FitConfig(output=tmp_path / "run", steps=2, rows=2, lr=0.05, progress=False)
    mixtures, task, settings = prepare(domain, MoLE(normaliser=Sigmoid()), run)
    mixture = mixtures["unet"]
    assert all(not mixture.gate(site).conditioning.weight.any() for site in mixture.sites)
    fit(task, run, settings)
    assert all(mixture.gate(site).conditioning.weight.any() for site in mixture.sites)
    assert "owl in ink style" in domain.report(tmp_path / "run")
    plain = build(tmp_path, given)
    _, task, settings = prepare(plain, MoLE(normaliser=Sigmoid()), run)
    with pytest.raises(ValueError, match=r"features was {.unet.: .time\+prompt.}, is None"):
        fit(task, run, settings)


def stop(_progress):
    raise Stop


def test_a_resumed_run_is_the_run_uninterrupted(tmp_path, given):
    found = []
    for name, stops in (("whole", [2]), ("resumed", [1, 2])):
        for steps in stops:
            domain = subject_style(tmp_path, given, conditioning=["time"])
            run = FitConfig(
                output=tmp_path / name, steps=2, rows=2, lr=0.05, save_every=1, progress=False
            )
            mixtures, task, settings = prepare(domain, MoLE(), run)
            fit(task, run, settings, None if steps == 2 else stop)
        found.append(mixtures["unet"].gates.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_configurations_say_it_as_a_list():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SubjectStyle, skip={"base", "experts", "pictures", "ordinary"})
    required = ["--prompt=p", "--caption=c", "--clip=x"]
    assert parser.parse_args([*required, '--conditioning=["time"]']).conditioning == ["time"]


def test_gate_files_bring_their_features(tmp_path):
    unet, found, _, call = tiny_unet()
    made = experts(unet)
    mixture = mix(unet, made, gate=MoLE(), blocks=found, features=told(unet))
    randomise(mixture)
    expected = call(0)
    path = tmp_path / "unet.safetensors"
    save_gates(mixture, path)
    mixture.unmix()
    features = features_of_file(read_gates(path), unet, STEPS)
    mix_from(unet, made, path, blocks=found, features=features)
    assert torch.equal(call(0), expected)
    text = tiny_pipeline().text_encoder
    with pytest.raises(ValueError, match=r"unet.safetensors: features: CLIPTextModel is told no"):
        features_of_file(read_gates(path), text, STEPS)


def test_mistakes_are_named(tmp_path, given):
    unet = tiny_unet()[0]
    with pytest.raises(ValueError, match="conditioning is 'noise', expected one of time, prompt"):
        subject_style(tmp_path, given, conditioning=["noise"])
    with pytest.raises(ValueError, match="names time, time, expected each once"):
        pair(tmp_path, given, conditioning=["time", "time"])
    with pytest.raises(ValueError, match="the gate Sum reads none: leave them out"):
        subject_style(tmp_path, given, conditioning=["time"]).mix(Sum(), "block")
    with pytest.raises(ValueError, match="CLIPTextModel is told no sample, which 'time' is read"):
        unet_features(tiny_pipeline().text_encoder, ["time"], STEPS)
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        unet_features(unet, ["time"], 0)
    assert unet_features(unet, [], STEPS) is None
