"""Experts and gates over a base in 8 or 4 bits, against the plain loop and the base dequantised."""

import importlib.util
import json

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from mole_vl import mix, read_peft
from mole_vl.gates import Average, MoLE
from mole_vl.training import FitConfig
from nlp.adapter import blocks, bound
from nlp.data import collate, write_rows
from nlp.models import load_base
from nlp.task import answer_losses
from nlp.train_experts import ExpertConfig, ExpertsConfig, main as train_experts
from pipelines import MoLETextGeneration
from tests.nlp.families import experts_on
from tests.nlp.test_adapter import row, sample
from tests.nlp.toys import ROWS, quantisable_folder
from tests.toys import randomise

BITS = ("8bit", "4bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(quantisable_folder(tmp_path_factory.mktemp("base")))


def batch():
    return collate([row(sample(i, 4 + i), [*sample(7 + i, 3), 2]) for i in range(3)], 0)


def mixed(model, gate):
    found = blocks(model)
    mixture = mix(model, experts_on(model, found), gate=gate, blocks=found)
    randomise(mixture, size=1.0)
    return mixture


def losses(model, mixture):
    with bound(mixture)(batch()) as _:
        values, scored = answer_losses(model, batch())
    return values[scored].mean()


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_each_layer_adds_the_plain_loop_to_the_quantised_base(folder, bits):
    model, _ = load_base(folder, quantise=bits)
    mixture = mixed(model, MoLE())
    experts = {one.name: one for one in experts_on(tiny_like(folder), blocks(model))}
    seen = {}
    for path, layer in mixture.layers.items():
        assert not layer.base.weight.is_floating_point()
        layer.register_forward_hook(
            lambda _layer, args, y, path=path: seen.update({path: (args[0], y)})
        )
    with bound(mixture)(batch()), mixture.record() as records:
        model(input_ids=batch()["input_ids"])
    weights = {record.site: record.output.weights for record in records}
    assert len(seen) == 14
    for path, (x, y) in seen.items():
        expected = mixture.layers[path].base(x)
        site = next(site for site in weights if path.startswith(site))
        for place, name in enumerate(mixture.names):
            update = x @ experts[name].layers[path].delta().T
            expected = expected + weights[site][:, place, None, None] * update
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


def tiny_like(folder):
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("bits", BITS)
def test_gates_learn_as_over_the_same_base_dequantised(folder, bits):
    model, _ = load_base(folder, quantise=bits)
    mixture = mixed(model, MoLE())
    # What is asked without a gradient first, as centring does, must not change the gradients.
    with torch.no_grad():
        before = losses(model, mixture)
    loss = losses(model, mixture)
    torch.testing.assert_close(loss.detach(), before, rtol=1e-3, atol=1e-3)
    found = torch.autograd.grad(loss, list(mixture.gates.parameters()))
    twin, _ = load_base(folder, quantise=bits)
    plain = twin.dequantize().float()
    reference = mixed(plain, MoLE())
    expected = torch.autograd.grad(losses(plain, reference), list(reference.gates.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        # LLM.int8() rounds the inputs of layers too.
        assert error < (0.2 if bits == "8bit" else 1e-3)


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_without_experts_weight_the_base_speaks_and_comes_back_bit_for_bit(folder, bits):
    model, _ = load_base(folder, quantise=bits)
    ids = batch()["input_ids"]
    expected = model(input_ids=ids).logits
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mixture = mixed(model, Average())
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-2)
    with mixture.pinned([0.0, 0.0]):
        assert torch.equal(model(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match=r"bake: model.layers.0.* is quantised and cannot take"):
        mixture.bake([0.5, 0.5])
    own = mixture.base_state_dict()
    assert own.keys() == weights.keys()
    mixture.unmix()
    assert torch.equal(model(input_ids=ids).logits, expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
        assert torch.equal(value, own[name])


@pytest.mark.parametrize("bits", BITS)
def test_a_pipeline_keeps_its_quantised_base(folder, bits, tmp_path):
    pipe = MoLETextGeneration.from_pretrained(folder, quantise=bits)
    pipe.load_experts(experts_on(tiny_like(folder), blocks(pipe.model)))
    call = {"max_new_tokens": 6, "do_sample": False}
    said = pipe(["abc", "defgh"], **call)
    pipe.save_pretrained(tmp_path / "all")
    again = MoLETextGeneration.from_pretrained(tmp_path / "all")
    linear = again.model.get_submodule("model.layers.0.mlp.up_proj.base")
    assert isinstance(linear, nn.Linear)
    assert not linear.weight.is_floating_point()
    assert again(["abc", "defgh"], **call) == said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("bits", BITS)
def test_an_expert_is_trained_over_a_quantised_base(folder, bits, tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    config = ExpertsConfig(
        experts=(ExpertConfig(name="plural", data=tmp_path / "rows.jsonl", rank=2, steps=12),),
        held_out=tmp_path / "rows.jsonl", base=folder, quantise=bits, output=tmp_path / "experts",
        fit=FitConfig(
            output=tmp_path / "runs", steps=12, rows=4, lr=0.01, log_every=1, progress=False
        ),
    )  # fmt: skip
    train_experts(config)
    log = (tmp_path / "runs/plural/metrics.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["lm"] < 0.9 * json.loads(log[0])["lm"]
    model, _ = load_base(folder, quantise=bits)
    expert = read_peft(tmp_path / "experts/plural")
    mix(model, [expert], gate=Average(), blocks=blocks(model))


def test_bits_that_cannot_be_are_named(folder, monkeypatch):
    with pytest.raises(ValueError, match="quantise is '3bit', expected one of 8bit, 4bit"):
        load_base(folder, quantise="3bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"'8bit', which needs the package bitsandbytes: pip"):
        load_base(folder, quantise="8bit")
