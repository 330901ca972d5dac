"""LoRA Switch and Composite, against each LoRA's own plain network."""

import pytest
import torch

from pipelines import Composite, Step, Switch
from tests.pipelines.test_drawing import stepwise
from tests.pipelines.toys import TEXT, draw, folded, loras, mixed, parts_of, same, sd1, sdxl

NAMES = ("ann", "bob", "cyd")


def test_switch_takes_turns():
    turns = [Switch(every=2).alone(Step(index=i, count=9), 3) for i in range(9)]
    assert turns == [[0], [0], [1], [1], [2], [2], [0], [0], [1]]
    with pytest.raises(ValueError, match="every is 0, expected at least 1"):
        Switch(every=0)


def test_switch_draws_each_step_with_one_expert():
    pipe = sd1()
    experts = loras(pipe)
    pipe.load_experts(experts)
    found = draw(pipe, mixing=Switch(every=1))
    same(found, stepwise(experts, [{"ann": 1.0}, {"bob": 1.0}, {"ann": 1.0}]))


def composed(base, experts, prompts, seeds, guidance_scale, strength=1.0):
    """The pipeline's own loop on a UNet whose output is the mean over each LoRA's plain UNet."""
    plains = [folded(base, experts, {n: strength}).unet for n in NAMES]
    pipe = folded(base, [], {})

    class Mean(torch.nn.Module):
        config, dtype, device = pipe.unet.config, torch.float32, torch.device("cpu")
        add_embedding = getattr(pipe.unet, "add_embedding", None)

        def forward(self, *args, **kwargs):
            return (torch.stack([unet(*args, **kwargs)[0] for unet in plains]).mean(0),)

    # Around the pipeline's own register of components.
    pipe.__dict__["unet"] = Mean()
    return draw(pipe, prompts, seeds, guidance_scale=guidance_scale)


@pytest.mark.parametrize("base", [sd1, sdxl])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_composite_is_the_mean_of_the_experts_predictions(base, guidance_scale):
    pipe = base()
    experts = loras(pipe, names=NAMES)
    expected = composed(base, experts, ["a", "b c"], (1, 2), guidance_scale, 0.8)
    pipe.load_experts(experts)
    found = draw(
        pipe, ["a", "b c"], (1, 2), guidance_scale=guidance_scale, mixing=Composite(), strength=0.8
    )
    same(found, expected)


def test_composite_runs_the_others_in_one_batch():
    pipe = mixed(names=NAMES)
    rows = []
    pipe.unet.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    draw(pipe, ["a", "b"], (1, 2), mixing=Composite())
    assert rows == [4, 8] * 3


def test_composite_of_one_is_that_one_and_masks_leave_it():
    pipe = mixed(names=NAMES)
    alone = draw(pipe, weights={"bob": 1.0})
    same(draw(pipe, mixing=Composite(), masked=["ann", "cyd"]), alone)
    same(draw(pipe, mixing=Switch(), masked=["ann", "cyd"]), alone)


@pytest.mark.parametrize("mixing", [Composite(), Switch(every=1)])
def test_text_encoders_keep_their_gates(mixing):
    pipe = mixed(parts=TEXT)
    embeds = pipe.encode_prompt("a cat", "cpu", 1, True)
    found = draw(pipe, mixing=mixing)
    given = draw(
        pipe, None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], mixing=mixing
    )
    same(found, given)
    assert parts_of(pipe) == TEXT


def test_composite_of_schedules_of_strength():
    pipe = mixed()
    found = draw(pipe, mixing=Composite(), strength=[1.0, 0.0, 0.0])
    first = draw(pipe, mixing=Composite(), strength=lambda step: float(step.index == 0))
    assert torch.equal(found, first)
