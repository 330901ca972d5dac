"""Called as any diffusers pipeline, and held against plain ones with the sums folded in."""

import threading

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0

from mole_vl.gates import Sum
from pipelines import Step
from tests.pipelines.toys import (
    BASES,
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

GIVEN = {"ann": 0.7, "bob": -0.4}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_constant_weights_are_the_plain_pipeline_with_the_sum_folded_in(base, guidance_scale):
    pipe = base()
    experts = loras(pipe, parts_of(pipe))
    plain = folded(base, experts, GIVEN)
    call = {"prompt": ["a cat", "dog"], "seeds": (1, 2), "guidance_scale": guidance_scale}
    call |= {"negative_prompt": ["bad", "worse"]} if guidance_scale > 1 else {}
    expected = draw(plain, **call)
    base_alone = draw(pipe, **call)
    pipe.load_experts(experts, gate=Sum())
    found = draw(pipe, **call, weights=GIVEN)
    same(found, expected)
    differ(found, base_alone)
    differ(found, draw(pipe, **call))
    pipe.unload_experts()
    assert torch.equal(draw(pipe, **call), base_alone)


# diffusers' schedulers hand torch's tensors to numpy in a way that numpy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize(
    "kind",
    [
        PNDMScheduler,
        HeunDiscreteScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
    ],
)
def test_any_scheduler(kind):
    pipe = sd1()
    experts = loras(pipe)
    plain = folded(sd1, experts, GIVEN)
    pipe.load_experts(experts)
    for each in (pipe, plain):
        each.scheduler = kind.from_config({"steps_offset": 1, "skip_prk_steps": True})
    seen = []

    def strength(step):
        seen.append(step)
        return 1.0

    same(draw(pipe, weights=GIVEN, strength=strength), draw(plain))
    assert [step.index for step in seen] == list(range(len(seen)))
    assert {step.count for step in seen} == {len(seen)} == {pipe.num_timesteps}
    assert (seen[0].share, seen[-1].share) == (0.0, 1.0)


def test_pictures_decoded_and_outputs_as_ever():
    pipe = sd1()
    experts = loras(pipe)
    plain = folded(sd1, experts, GIVEN)
    pipe.load_experts(experts)
    found = draw(pipe, output_type="np", weights=GIVEN)
    same(torch.from_numpy(found), torch.from_numpy(draw(plain, output_type="np")))
    assert draw(pipe, output_type="pil")[0].size == (16, 16)
    assert isinstance(pipe("a", num_inference_steps=1, return_dict=False), tuple)


@pytest.mark.parametrize("base", [sd1, sdxl])
def test_the_scale_of_cross_attention_kwargs_is_the_strength(base):
    pipe = base()
    experts = loras(pipe, parts_of(pipe))
    plain = folded(base, experts, {"ann": 0.25, "bob": 0.25})
    pipe.load_experts(experts)
    found = draw(pipe, strength=0.5)
    same(found, draw(plain))
    same(draw(pipe, cross_attention_kwargs={"scale": 0.5}), found)
    same(draw(pipe, strength=2.0, cross_attention_kwargs={"scale": 0.25}), found)


class Louder(AttnProcessor2_0):
    def __call__(self, *args, times=1.0, **kwargs):
        return times * super().__call__(*args, **kwargs)


def test_other_cross_attention_kwargs_pass_on():
    pipe = sd1()
    experts = loras(pipe)
    plain = folded(sd1, experts, {"ann": 0.25, "bob": 0.25})
    pipe.load_experts(experts)
    for each in (pipe, plain):
        each.unet.set_attn_processor(Louder())
    found = draw(pipe, cross_attention_kwargs={"scale": 0.5, "times": 3.0})
    same(found, draw(plain, cross_attention_kwargs={"times": 3.0}))
    differ(found, draw(plain))


def test_prompt_embeds_and_callbacks():
    pipe = mixed(parts=TEXT)
    positive, negative = pipe.encode_prompt("a cat", "cpu", 1, True, "bad")
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        return tensors

    found = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="latent",
        callback_on_step_end=callback,
    ).images
    same(found, draw(pipe, "a cat", negative_prompt="bad"))
    assert steps == [0, 1, 2]


def test_a_callback_may_end_guidance():
    """diffusers' own recipe: from some step on the positive rows run alone."""
    pipe = sd1()
    experts = loras(pipe)
    plain = folded(sd1, experts, GIVEN)
    pipe.load_experts(experts)
    each = torch.tensor([[GIVEN["ann"], GIVEN["bob"]]] * 2)

    def stop(pipeline, step, timestep, tensors):
        if step == 0:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
            pipeline._guidance_scale = 0.0
        return tensors

    call = {
        "prompt": ["a", "b"],
        "seeds": (1, 2),
        "callback_on_step_end": stop,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    same(draw(pipe, **call, weights=each), draw(plain, **call))
    draw(mixed(), **call)


@pytest.mark.parametrize("base", [sd1, sdxl])
def test_a_batch_is_its_pictures_one_by_one(base):
    pipe = mixed(base, parts_of(base()))
    prompts, negatives = ["a cat", "the dog", "it"], ["bad", "no", "x y z"]
    batch = draw(pipe, prompts, (4, 5, 6), negative_prompt=negatives)
    for row, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = draw(pipe, prompt, (4 + row,), negative_prompt=negative)
        same(batch[row : row + 1], alone)


@pytest.mark.parametrize("base", [sd1, sdxl])
def test_pictures_of_one_prompt_are_pictures_one_by_one(base):
    pipe = mixed(base, parts_of(base()))
    batch = draw(pipe, ["a cat", "dog"], (1, 2, 3, 4), num_images_per_prompt=2)
    for row, prompt in enumerate(["a cat", "a cat", "dog", "dog"]):
        same(batch[row : row + 1], draw(pipe, prompt, (1 + row,)))


def test_misspelt_keywords_are_refused():
    with pytest.raises(TypeError, match="knows no keyword 'stregth'"):
        draw(mixed(), stregth=0.5)


def test_without_experts_it_is_the_plain_pipeline():
    pipe = sd1()
    assert torch.equal(draw(pipe), draw(folded(sd1, [], {})))
    with pytest.raises(RuntimeError, match="nothing to mix"):
        draw(pipe, strength=0.5)


def test_a_baked_pipeline_draws_too():
    pipe = sd1()
    experts = loras(pipe)
    pipe.load_experts(experts)
    pipe.mixtures["unet"].bake(GIVEN)
    same(draw(pipe), draw(folded(sd1, experts, GIVEN)))


def test_an_error_on_the_way_leaves_all_as_it_was():
    pipe = mixed(parts=TEXT)
    expected = draw(pipe)

    def strength(step):
        if step.index == 1:
            raise KeyboardInterrupt
        return 0.3

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, strength=strength, masked=["ann"])
    assert torch.equal(draw(pipe), expected)


def test_a_second_thread_waits():
    pipe = mixed(parts=TEXT)
    alone = [draw(pipe, strength=s) for s in (0.5, 2.0)]
    inside, done = threading.Event(), threading.Event()
    found = {}

    def strength(step: Step):
        inside.set()
        # The other thread has its chance here, at every step.
        assert not done.wait(0.2)
        return 0.5

    def second():
        inside.wait(10)
        found["second"] = draw(pipe, strength=2.0)
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    found["first"] = draw(pipe, strength=strength)
    thread.join(30)
    assert torch.equal(found["first"], alone[0])
    assert torch.equal(found["second"], alone[1])
