"""Guidance, given weights, masks and schedules, forward by forward."""

import pytest
import torch

from dreambooth.adapter import positive_rows
from mole_vl.gates import Average, Sum
from pipelines import Composite, Switch
from tests.pipelines.toys import (
    TEXT,
    differ,
    draw,
    folded,
    loras,
    mixed,
    parts_of,
    same,
    sd1,
    sdxl,
)


def sampled(pipe, noise_of, prompts, negatives, seeds, guidance_scale=4.0):
    """The pipeline's loop by hand: `noise_of(latents, t, negative, positive)` is the UNet's."""
    shape = (1, 4, 8, 8)
    latents = torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    positive, negative = pipe.encode_prompt(prompts, "cpu", 1, True, negatives)
    pipe.scheduler.set_timesteps(3)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            minus, plus = noise_of(latents, t, negative, positive)
        noise = minus + guidance_scale * (plus - minus)
        latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("guidance", ["shared", "own"])
def test_one_batch_of_guidance_is_two_passes(guidance):
    pipe = mixed()
    unet, mixture = pipe.unet, pipe.mixtures["unet"]

    def two_passes(latents, t, negative, positive):
        with mixture.record() as records:
            plus = unet(latents, t, positive).sample
        if guidance == "own":
            return unet(latents, t, negative).sample, plus
        with mixture.pinned({record.site: record.output.weights for record in records}):
            return unet(latents, t, negative).sample, plus

    prompts, negatives, seeds = ["a cat", "dog"], ["bad", "ugly x"], (1, 2)
    expected = sampled(pipe, two_passes, prompts, negatives, seeds)
    found = draw(pipe, prompts, seeds, negative_prompt=negatives, guidance=guidance)
    same(found, expected)
    other = "own" if guidance == "shared" else "shared"
    differ(found, draw(pipe, prompts, seeds, negative_prompt=negatives, guidance=other))


def test_negative_prompts_have_text_gates_of_their_own_and_padding_says_nothing():
    pipe = mixed(parts=TEXT)
    mixture, tokenizer = pipe.mixtures["text_encoder"], pipe.tokenizer
    ids = tokenizer(["ab", "abcd"], padding="max_length", max_length=12, return_tensors="pt")
    real = ids.attention_mask.bool()
    assert real.sum(1).tolist() == [4, 6]
    with mixture.condition(real=real), torch.no_grad():
        expected = pipe.text_encoder(ids.input_ids)[0]
    found = pipe.encode_prompt(["ab", "abcd"], "cpu", 1, True, ["abcd", "ab"])
    same(found[0], expected)
    same(found[1], expected.flip(0))
    with torch.no_grad():
        differ(found[0], pipe.text_encoder(ids.input_ids)[0])


def test_a_direct_encode_prompt_takes_the_lora_scale():
    pipe = sd1()
    experts = loras(pipe, TEXT)
    plain = folded(sd1, experts, {"ann": 0.25, "bob": 0.25})
    pipe.load_experts(experts)
    found = pipe.encode_prompt("a cat", "cpu", 1, False, lora_scale=0.5)[0]
    same(found, plain.encode_prompt("a cat", "cpu", 1, False)[0])


@pytest.mark.parametrize("base", [sd1, sdxl])
def test_weights_of_each_picture(base):
    pipe = base()
    experts = loras(pipe, parts_of(pipe))
    weights = torch.tensor([[1.0, 0.0], [0.2, 0.9]])
    plain = [
        folded(base, experts, dict(zip(("ann", "bob"), row.tolist(), strict=True)))
        for row in weights
    ]
    pipe.load_experts(experts)
    found = draw(pipe, ["a", "b"], (1, 2), weights=weights)
    same(found[:1], draw(plain[0], "a", (1,)))
    same(found[1:], draw(plain[1], "b", (2,)))
    same(draw(pipe, ["a", "b"], (1, 2), weights=weights.tolist()), found)
    same(draw(pipe, ["a", "a"], (1, 2), weights=[0.2, 0.9])[1:], draw(plain[1], "a", (2,)))


def test_weights_of_copies_of_one_prompt():
    weights = [[1.0, 0.0], [0.0, 1.0]]
    pipe = mixed()
    found = draw(pipe, "a", (1, 2), num_images_per_prompt=2, weights=weights)
    same(found[1:], draw(pipe, "a", (2,), weights={"bob": 1.0}))
    pipe = mixed(parts=TEXT)
    with pytest.raises(ValueError, match="pictures of one prompt share its encoding"):
        draw(pipe, "a", (1, 2), num_images_per_prompt=2, weights=weights)
    draw(pipe, "a", (1, 2), num_images_per_prompt=2, weights=[[0.3, 0.1]] * 2)


def test_a_part_that_lacks_an_expert_takes_the_others():
    pipe = sd1()
    ann, bob = loras(pipe, TEXT)
    experts = [{"unet": ann["unet"]}, bob]
    given = {"ann": 0.5, "bob": -0.6}
    plain = [folded(sd1, experts, given), folded(sd1, experts, {"ann": 1.0})]
    pipe.load_experts(experts, gate=Sum())
    assert pipe.mixtures["text_encoder"].names == ("bob",)
    assert pipe.experts == ("ann", "bob")
    same(draw(pipe, weights=given), draw(plain[0]))
    same(draw(pipe, weights=[0.5, -0.6]), draw(plain[0]))
    same(draw(pipe, masked="bob"), draw(plain[1]))


def test_masks():
    pipe = sd1()
    experts = loras(pipe, names=("ann", "bob", "cyd"))
    half = folded(sd1, experts, {"ann": 0.5, "cyd": 0.5})
    given = folded(sd1, experts, {"cyd": 2.0})
    pipe.load_experts(experts, gate=Average())
    same(draw(pipe, masked=["bob"]), draw(half))
    weights = {"ann": 1.0, "bob": 3.0, "cyd": 2.0}
    same(draw(pipe, masked=["bob", "ann"], weights=weights), draw(given))


def test_schedules_of_strength_and_weights():
    pipe = sd1()
    experts = loras(pipe)
    pipe.load_experts(experts)
    levels = [1.0, 0.5, 0.0]
    expected = stepwise(experts, [{"ann": s / 2, "bob": s / 2} for s in levels])
    same(draw(pipe, strength=levels), expected)
    same(draw(pipe, strength=lambda step: 1 - step.share), expected)
    same(draw(pipe, strength=lambda step: levels[step.index]), expected)
    turns = [{"ann": 1.0}, {"ann": 1.0}, {"bob": 1.0}]
    expected = stepwise(experts, turns)
    same(draw(pipe, weights=turns), expected)
    same(draw(pipe, weights=turns[1:]), expected)
    same(draw(pipe, weights=lambda step: turns[step.index]), expected)
    both = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    same(draw(pipe, weights=both), expected)


def stepwise(experts, weights):
    """Latents where each step runs a plain UNet of its own."""
    plains = iter([folded(sd1, experts, given) for given in weights])

    def noise_of(latents, t, negative, positive):
        unet = next(plains).unet
        return unet(latents, t, negative).sample, unet(latents, t, positive).sample

    return sampled(sd1(), noise_of, "a cat", None, (0,))


def test_a_text_encoder_takes_the_first_step_of_a_schedule():
    pipe = sd1()
    experts = [{"text_encoder": parts["text_encoder"]} for parts in loras(pipe, TEXT)]
    plain = folded(sd1, experts, {"ann": 0.15, "bob": 0.15})
    pipe.load_experts(experts)
    same(draw(pipe, strength=[0.3, 0.8, 1.0]), draw(plain))


def test_contexts_of_the_handle_hold_too():
    pipe = mixed()
    mixture = pipe.mixtures["unet"]
    site = next(iter(mixture.sites))
    with mixture.pinned({site: {"ann": 3.0}}):
        found = draw(pipe)
    differ(found, draw(pipe))
    with mixture.disabled():
        assert torch.equal(draw(pipe), draw(folded(sd1, [], {})))


def test_rows_of_the_adapter_are_the_pipelines():
    assert positive_rows(2).tolist() == [2, 3, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"masked": ["eve"]}, "masked: unknown expert 'eve'; the pipeline has ann, bob"),
        ({"masked": ["ann", "bob"]}, "masked: no expert is left; strength=0 draws the base"),
        ({"weights": {"eve": 1.0}}, "weights: unknown expert 'eve'"),
        ({"weights": [[1.0, 0.0]] * 3}, r"shape \(3, 2\): expected \(2,\) or \(1, 2\), for 1 pict"),
        ({"weights": [1.0]}, r"shape \(1,\): expected \(2,\)"),
        ({"weights": [float("nan"), 1.0]}, "expected finite numbers"),
        ({"weights": {"ann": float("inf")}}, "expected finite numbers"),
        ({"strength": float("nan")}, "strength is nan, expected finite numbers"),
        ({"mixing": "switch"}, "mixing is a str, expected a Composition"),
        ({"mixing": Switch}, r"mixing is the class Switch, expected an instance: Switch\(\)"),
        ({"weights": []}, "a schedule is empty"),
        ({"strength": ()}, "a schedule is empty"),
        ({"guidance": "both"}, "guidance is 'both', expected one of shared, own"),
        ({"weights": [1, 1], "mixing": Composite()}, "weights and mixing both replace the gates"),
        ({"weights": lambda step: {"eve": 1.0}}, "weights: unknown expert 'eve'"),
    ],
)
def test_mistakes_are_said_and_change_nothing(call, message):
    pipe = mixed(parts=TEXT)
    expected = draw(pipe)
    with pytest.raises(ValueError, match=message):
        draw(pipe, **call)
    assert torch.equal(draw(pipe), expected)
