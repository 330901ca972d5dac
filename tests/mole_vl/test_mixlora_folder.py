"""Published MixLoRA adapters on a tiny LLaMA, against the loop over their tensors."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mole_vl.feedforward import feed_forwards
from mole_vl.gates import Switch, TopK, TopP
from mole_vl.layers import layer_shapes
from mole_vl.mixlora import Form
from mole_vl.mixlora_folder import read_mixlora
from mole_vl.nonlinearity import fault_of_nonlinearity
from mole_vl.stack import Learning
from nlp.adapter import blocks
from tests.nlp.families import causal
from tests.nlp.published import CONFIG, MLP, OLDER, loop_of, publish, respelt, tensors_of

IDS = torch.tensor([[5, 9, 2, 7, 30], [1, 3, 4, 6, 8]])
DYNAMIC = {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 0.0}
SWITCH = {"routing_strategy": "mixlora-switch", "expert_capacity": 96, "sparse_step": None}


def config_of(**changes):
    own = {name: value for name, value in CONFIG.items() if name != "top_k"}
    return {**(CONFIG if "routing_strategy" not in changes else own), **changes}


@pytest.fixture
def model():
    return causal("llama")


def read(folder, model):
    return read_mixlora(folder, model, blocks=blocks(model))


def held(folder, config, tensors, **how):
    """Logits of the adapter that was read, held against its loop."""
    model = causal("llama")
    read(folder, model).mix(model, blocks=blocks(model), **how)
    found = model(input_ids=IDS).logits
    expected = loop_of(causal("llama"), config, tensors)(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, causal("llama")(input_ids=IDS).logits, atol=1e-2)
    return model


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        DYNAMIC,
        {**DYNAMIC, "top_p": 1.0},
        SWITCH,
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": ["gate_proj", "up_proj"], "act_fn": None},
        {"use_rslora": True, "expert_lora": {"bias": "none", "r": 5, "use_rslora": True}},
        {"expert_lora": {"r": 2, "lora_alpha": 7, "lora_dropout": 0.0}},
    ],
)
def test_an_adapter_is_its_loop(model, tmp_path, changes, pickled):
    config = config_of(**changes)
    tensors = tensors_of(model, config)
    folder = publish(tmp_path / "adapter", config, tensors, pickled=pickled)
    if config.get("use_rslora"):
        # The loop scales the attention plainly: the same scale by another alpha.
        config = {**config, "lora_alpha": 6 * math.sqrt(3), "use_rslora": False}
        config["expert_lora"] = {"r": 5, "lora_alpha": 6, "use_rslora": True}
    held(folder, config, tensors)


@pytest.mark.parametrize("older", [False, True])
def test_older_spellings_are_read(model, tmp_path, older):
    tensors = tensors_of(model, CONFIG)
    config = {**CONFIG, "routing_strategy": "mixtral"}
    if older:
        config["target_modules"] = [OLDER.get(n, n) for n in CONFIG["target_modules"]]
    spelt = {respelt(key, older): value for key, value in tensors.items()}
    held(publish(tmp_path, config, spelt), CONFIG, tensors)


def test_what_was_read_is_told(model, tmp_path):
    tensors = tensors_of(model, CONFIG)
    found = read(publish(tmp_path, CONFIG, tensors), model)
    assert [one.name for one in found.experts] == [f"expert{e}" for e in range(4)] + ["shared"]
    assert found.experts[0].base == "ORG/NAME"
    assert set(found.experts[0].layers) == {
        f"model.layers.{n}.mlp.{m}" for n in (0, 1) for m in MLP
    }
    assert "model.layers.1.self_attn.k_proj" in found.experts[-1].layers
    router = found.routers["model.layers.1.mlp"]
    assert torch.equal(router, tensors["mixlora.layers.1.mlp.moe_gate.weight"])
    method = found.method
    assert method.choice == TopK(k=2)
    assert method.form == method.shared == Form(rank=3, alpha=6)
    assert (method.experts, method.dropout, method.z) == (4, 0.05, 0.0)
    for changes, choice in (
        (DYNAMIC, TopP(p=0.6, renormalise=False)),
        ({**DYNAMIC, "top_p": 1}, TopK(k=4)),
        ({**SWITCH, "jitter_noise": 0.1, "ffn_dropout": 0.1}, Switch(capacity=96)),
    ):
        config = config_of(**changes)
        found = read(publish(tmp_path / "other", config, tensors_of(model, config)), model)
        assert found.method.choice == choice
    assert (found.method.jitter, found.method.z) == (0.1, 0.001)


def test_experts_are_frozen_unless_they_are_to_go_on(model, tmp_path):
    tensors = tensors_of(model, CONFIG)
    folder = publish(tmp_path, CONFIG, tensors)
    frozen = held(folder, CONFIG, tensors)
    assert all(name.startswith("mixture.gates") for name, p in frozen.named_parameters()
               if p.requires_grad)  # fmt: skip
    learning = held(folder, CONFIG, tensors, learning=Learning(dropout=0.05))
    learning(input_ids=IDS).logits.sum().backward()
    experts = learning.mixture.parameters_of_experts()
    moved = {
        name.rsplit(".", 1)[0] for name, p in experts.items() if p.grad is not None and p.grad.any()
    }
    assert moved == {name.rsplit(".", 1)[0] for name in experts}
    assert len(moved) == 28


@pytest.mark.parametrize("family", ["phi", "phi3", "qwen2", "gemma"])
def test_layers_are_found_by_structure_in_other_families(family, tmp_path):
    model = causal(family)
    shapes = layer_shapes(model)
    names = sorted({path.rpartition(".")[2] for path in shapes if path != "lm_head"})
    inside = feed_forwards(model, shapes, blocks(model))
    config = {**CONFIG, "target_modules": names, "num_experts": 2, "act_fn": None}
    tensors = {}
    for path, (out, width) in shapes.items():
        if path == "lm_head":
            continue
        _, _, number, part, name = path.split(".")
        own = [f".experts.{e}" for e in range(2)] if path in inside else [""]
        for one in own:
            key = f"mixlora.layers.{number}.{part}.{name}{one}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(3, width) / 4
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, 3) / 4
        tensors[f"mixlora.layers.{number}.mlp.moe_gate.weight"] = torch.randn(2, 16)
    found = read(publish(tmp_path, config, tensors), model)
    changed = {path for expert in found.experts for path in expert.layers}
    assert changed == set(shapes) - {"lm_head"}
    found.mix(model, blocks=blocks(model))
    assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "adapter_config.json: peft_type is 'LORA', expected 'MIXLORA'"),
        ({"routing_strategy": "loramoe"}, "routing_strategy is 'loramoe', expected one of mixlora"),
        ({"use_dora": True}, "use_dora = True is not supported, whose magnitudes its files lack"),
        ({**DYNAMIC, "temperature": 0.5}, "temperature = 0.5 is not supported"),
        ({**SWITCH, "sparse_step": 2}, "sparse_step = 2 is not supported"),
        ({"bias": "all", "rescale": 2}, "bias = 'all' is not supported; rescale = 2 is not supp"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', whose head"),
        ({"top_p": 0.5}, "top_p = 0.5 is not supported"),
        (
            {"r": 0, "lora_alpha": "x", "num_experts": True, "target_modules": [], "top_k": 1.5},
            r"target_modules is \[\], .*; num_experts is True, .*; top_k is 1.5, expected a whole "
            "number, 1 or more; r is 0, .*; lora_alpha is 'x', expected a positive number",
        ),
        ({"lora_dropout": 1, "act_fn": 3}, "act_fn is 3, expected a name; lora_dropout is 1, exp"),
        ({**DYNAMIC, "top_p": 1.5}, "top_p is 1.5, expected a number above 0, at most 1"),
        ({"jitter_noise": 2}, "jitter_noise is 2, expected 0 <= jitter_noise < 1"),
        ({"expert_lora": {"r": -1, "init": 1}}, "expert_lora: r is -1, .*expert_lora: init = 1 is"),
        ({"expert_lora": [1]}, r"expert_lora is \[1\], expected settings by name"),
        ({"act_fn": "gelu_new"}, "act_fn: the nonlinearity is 'gelu_new', and model.layers.0.mlp "
         "has 'silu'"),
        ({"act_fn": "snake"}, "act_fn: the nonlinearity 'snake' is not known, expected one of gel"),
        ({"target_modules": ["q_proj", "o_proj"]}, r"target_modules \(q_proj, o_proj\) lie in no "
         "feed-forward of this model, so that the experts change nothing"),
        ({"target_modules": ["fc1", "q_proj"]}, "target_modules names fc1, and no block of this "),
    ],
)  # fmt: skip
def test_a_config_that_does_not_hold_is_told(model, tmp_path, changes, message):
    config = config_of(**changes)
    folder = publish(tmp_path, config, tensors_of(model, CONFIG))
    with pytest.raises(ValueError, match=message):
        read(folder, model)


def test_tensors_that_do_not_fit_are_told(model, tmp_path):
    tensors = tensors_of(model, CONFIG)
    key = "mixlora.layers.1.mlp.up_proj.experts.2.lora_B.weight"

    def told(message, changed, config=CONFIG):
        publish(tmp_path, config, changed)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, model)

    rest = {name: value for name, value in tensors.items() if name != key}
    told(rf"adapter_model.bin does not fit .*: {key} is missing, expected \(24, 3\); of 4 e", rest)
    told(r"up_proj.experts.2.lora_B.w is unknown", {**rest, key[:-5]: tensors[key]})
    told(rf"{key} is \(24, 2\), expected \(24, 3\)", {**rest, key: torch.ones(24, 2)})
    told(rf"{key} holds NaN", {**rest, key: torch.full((24, 3), math.nan)})
    router = "mixlora.layers.0.mlp.moe_gate.weight"
    told(rf"{router} is \(4, 8\), expected \(4, 16\)", {**tensors, router: torch.ones(4, 8)})
    told("experts.4.lora_A.weight is unknown.*and .* more; of 4 experts in 2 layers",
         tensors_of(model, {**CONFIG, "num_experts": 8}))  # fmt: skip
    more = {key.replace("layers.1", "layers.2"): torch.ones(1) for key in tensors}
    told("mixlora.layers.2.mlp.moe_gate.weight is unknown", {**tensors, **more})
    older = {respelt(name, True): value for name, value in rest.items()}
    told("mixlora.layers.1.experts.2.w3_proj.lora_B.weight is missing", older)
    bigger = {key: value.repeat(1, 2) for key, value in tensors.items()}
    told(r"is \(4, 32\), expected \(4, 16\); .*and \d+ more", bigger)


def test_files_that_cannot_be_read_are_told(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no published MixLoRA adapter"):
        read(tmp_path, model)
    publish(tmp_path, CONFIG, {})
    file = tmp_path / "adapter_model.bin"
    torch.save({"a": Path("a")}, file)
    with pytest.raises(ValueError, match=r"adapter_model.bin is damaged or holds more than tens"):
        read(tmp_path, model)
    torch.save([torch.ones(1)], file)
    with pytest.raises(ValueError, match="holds a list, expected tensors by name"):
        read(tmp_path, model)
    file.write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="is damaged or holds more than tensors"):
        read(tmp_path, model)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is missing, and adapter_model"):
        read(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        read(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "own"),
    [
        *((family, "silu") for family in ("llama", "mistral", "qwen2", "phi3")),
        *((family, "gelu_new") for family in ("phi", "gpt2", "gpt_neo", "gemma")),
        ("gpt_neox", "gelu"),
    ],
)
def test_nonlinearities_are_told_apart(family, own, dtype):
    model = causal(family).to(dtype)
    inside = feed_forwards(model, layer_shapes(model), blocks(model))
    owner = next(iter(inside.values()))
    assert fault_of_nonlinearity(model, owner, own) is None
    for other in {"relu", "silu", "tanh", "linear", "sigmoid", "quick_gelu"} - {own}:
        assert fault_of_nonlinearity(model, owner, other), other


def test_a_nonlinearity_that_is_none_of_the_known_ones_is_told(model):
    class Odd(nn.Module):
        def forward(self, x):
            return x.sin()

    for block in model.model.layers:
        block.mlp.act_fn = Odd()
    owner = next(iter(feed_forwards(model, layer_shapes(model), blocks(model)).values()))
    fault = fault_of_nonlinearity(model, owner, "silu")
    assert fault == "the nonlinearity is 'silu', and model.layers.0.mlp has another one"
