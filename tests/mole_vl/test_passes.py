"""A layer that runs again during backward reads what it read first."""

import gc
import weakref
from threading import Thread

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from mole_vl import Expert, Factors, mix
from mole_vl.gates import Free, Hidden, MoLE, Responses, Sigmoid
from mole_vl.losses import balance
from tests.toys import BLOCKS, SITES, Toy, inputs, randomise, three


def random_experts(model: nn.Module, endings: tuple[str, ...]) -> list[Expert]:
    experts = []
    for name, rank in (("ann", 2), ("bob", 3)):
        layers = {
            path: Factors(torch.randn(rank, m.in_features), torch.randn(m.out_features, rank), 0.1)
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear) and path.endswith(endings)
        }
        experts.append(Expert(name, layers))
    return experts


def tiny_llama():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    blocks = {f"model.layers.{i}": 16 for i in range(3)}
    tokens = [torch.randint(0, 50, (2, 7)), torch.randint(0, 50, (2, 7))]

    def call(index):
        return model(input_ids=tokens[index]).logits

    return model, blocks, ("q_proj", "up_proj", "down_proj"), call


def tiny_unet():
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4,
    ).train()  # fmt: skip
    blocks = {
        name: 16
        for name, m in sorted(model.named_modules())  # down, mid, up: the order they run in
        if type(m).__name__ == "BasicTransformerBlock"
    }
    given = [
        (torch.randn(2, 4, 8, 8), torch.tensor([30, 700]), torch.randn(2, 5, 12)),
        (torch.randn(2, 4, 8, 8), torch.tensor([900, 10]), torch.randn(2, 5, 12)),
    ]

    def call(index):
        return model(*given[index]).sample

    return model, blocks, ("to_q", "to_k", "to_out.0"), call


def toy():
    model = Toy()
    given = [inputs(seed=1), inputs(seed=2)]
    return model, BLOCKS, None, lambda index: model(*given[index])


def checkpointing(model: nn.Module, on: bool) -> None:
    if isinstance(model, Toy):
        model.checkpointing = on
    elif isinstance(model, UNet2DConditionModel):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
    elif on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("build", [toy, tiny_llama, tiny_unet])
@pytest.mark.parametrize("gate", [MoLE(), MoLE(score=Responses(), normaliser=Sigmoid())])
def test_two_forwards_then_one_backward_with_and_without_checkpointing(build, site, gate):
    model, blocks, endings, call = build()
    experts = three(model) if endings is None else random_experts(model, endings)
    mixture = mix(model, experts, gate=gate, **site, blocks=blocks)
    randomise(mixture)
    found = []
    for on in (False, True):
        checkpointing(model, on)
        with mixture.record() as first, mixture.masked(["ann"]), mixture.scaled(0.7):
            one = call(0)
        with mixture.record() as second:
            two = call(1)
        # Conditions of a third kind hold while the backward runs the blocks again.
        with mixture.pinned({"bob": 9.0}), mixture.scaled(5.0), mixture.record() as during:
            loss = one.square().mean() + two.square().mean() + balance(second)
            grads = torch.autograd.grad(loss, list(mixture.parameters()))
        assert len(first) == len(second) == len(mixture.sites)
        assert not during
        found.append((loss.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert all(grad.abs().sum() > 0 for grad in found[0][1] if grad.dim() > 0)
    for plain, again in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("build", [toy, tiny_llama])
def test_results_held_for_later_forwards_do_not_disturb_a_rerun(build, site):
    model, blocks, endings, call = build()
    experts = three(model) if endings is None else random_experts(model, endings)
    mixture = mix(model, experts, gate=MoLE(), **site, blocks=blocks)
    randomise(mixture)
    found = []
    for on in (False, True):
        checkpointing(model, on)
        with mixture.condition(hold=True):
            loss = call(0).square().mean()
        found.append(torch.autograd.grad(loss, list(mixture.parameters())))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-4)


def test_forwards_of_two_threads_are_not_confused():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    randomise(mixture)
    model.checkpointing = True
    outputs = []
    threads = [Thread(target=lambda: outputs.append(model(*inputs()))) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    with pytest.raises(RuntimeError, match="forwards of several threads await"):
        sum(output.square().mean() for output in outputs).backward()


def test_a_pass_lives_no_longer_than_its_graph():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    output = model(*inputs())
    passes = mixture._dispatch.passes
    alive = passes._alive[0]
    gc.collect()
    assert alive() is not None
    del output
    gc.collect()
    assert alive() is None
    with torch.no_grad():
        model(*inputs())
    assert all(ref() is None for ref in passes._alive)
    assert isinstance(alive, weakref.ref)


@pytest.mark.parametrize("score", [Hidden(), Free()])
def test_reentrant_checkpointing_is_refused(score):
    model = Toy()
    mix(model, three(model), gate=MoLE(score=score), blocks=BLOCKS)

    class Reentrant(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, context):
            return checkpoint(self.block, x, context, use_reentrant=True)

    model.blocks[1] = Reentrant(model.blocks[1])
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(*inputs())
