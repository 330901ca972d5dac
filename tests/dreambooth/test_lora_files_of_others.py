"""LoRA files as diffusers, its older versions and kohya's trainers write them."""

import copy
import json

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from dreambooth.lora_files import read_lora, write_lora
from mole_vl import write_peft
from tests.dreambooth.loras import (
    ATTENTION,
    LAYER,
    check_same,
    kohya_pair,
    mixed,
    one_layer,
    picture,
)
from tests.dreambooth.toys import tiny_pipeline

# Files that others wrote


def trained(pipe, unet=("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in")):
    """Give a pipeline peft's adapters, as after training.

    Returns diffusers' keywords to save them and, by component, the updates as peft computes them.
    """
    settings = {
        "unet": {
            "r": 3, "lora_alpha": 5, "rank_pattern": {"attn2.to_k": 2}, "use_rslora": True,
            "target_modules": list(unet),
        },
        "text_encoder": {
            "r": 2, "lora_alpha": 3, "alpha_pattern": {"v_proj": 7},
            "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
        },
    }  # fmt: skip
    for component, config in settings.items():
        model = getattr(pipe, component)
        model.add_adapter(LoraConfig(**config))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
    layers = {
        f"{component}_lora_layers": get_peft_model_state_dict(getattr(pipe, component))
        for component in settings
    }
    deltas = {
        component: {
            path: module.get_delta_weight("default").detach()
            for path, module in getattr(pipe, component).named_modules()
            if hasattr(module, "get_delta_weight")
        }
        for component in settings
    }
    return layers, deltas


def check_deltas(deltas, file):
    assert file.experts.keys() == deltas.keys()
    for component, expert in file.experts.items():
        found = {p.removeprefix("text_model."): f.delta() for p, f in expert.layers.items()}
        assert found.keys() == deltas[component].keys()
        for path, delta in deltas[component].items():
            torch.testing.assert_close(found[path], delta)


def test_what_diffusers_saves_of_peft_adapters_is_read(tmp_path):
    pipe = tiny_pipeline()
    layers, deltas = trained(pipe)
    metadata = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    pipe.save_lora_weights(tmp_path / "dog", **layers, **metadata)
    check_deltas(deltas, read_lora(tmp_path / "dog"))


def test_the_unets_own_save_is_read(tmp_path):
    pipe = tiny_pipeline()
    _, deltas = trained(pipe)
    pipe.unet.save_lora_adapter(tmp_path / "dog")
    check_deltas({"unet": deltas["unet"]}, read_lora(tmp_path / "dog"))


def in_older_keys(layers):
    older = {key: convert_state_dict_to_diffusers(state) for key, state in layers.items()}
    assert any("lora_linear_layer" in key for key in older["text_encoder_lora_layers"])
    return older


@pytest.mark.parametrize("older", [False, True], ids=["peft's keys", "older keys"])
def test_a_save_without_config_has_the_scale_1_that_diffusers_takes(tmp_path, older):
    pipe = tiny_pipeline()
    layers, _ = trained(copy.deepcopy(pipe), unet=["to_q", "to_k", "to_v", "to_out.0"])
    pipe.save_lora_weights(tmp_path / "dog", **(in_older_keys(layers) if older else layers))
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog"))
    made = picture(mixed(pipe, read_lora(tmp_path / "dog")))
    torch.testing.assert_close(picture(plain), made, rtol=1e-4, atol=1e-4)


def test_older_keys_of_attention_beside_new_ones_of_convolutions_are_all_read(tmp_path):
    # What diffusers' converter makes of such a model; its loader then drops one of the two.
    pipe = tiny_pipeline()
    layers, _ = trained(copy.deepcopy(pipe))
    pipe.save_lora_weights(tmp_path / "dog", **layers)
    pipe.save_lora_weights(tmp_path / "cat", **in_older_keys(layers))
    check_same(read_lora(tmp_path / "dog").experts, read_lora(tmp_path / "cat").experts)


def test_kohya_files_of_diffusers_converter_are_read(tmp_path):
    pipe = tiny_pipeline()
    layers, _ = trained(copy.deepcopy(pipe))
    state = StableDiffusionLoraLoaderMixin.pack_weights(layers["unet_lora_layers"], "unet")
    state |= StableDiffusionLoraLoaderMixin.pack_weights(
        layers["text_encoder_lora_layers"], "text_encoder"
    )
    save_file(convert_state_dict_to_kohya(state), tmp_path / "dog.safetensors")
    save_file(state, tmp_path / "cat.safetensors")
    expected = read_lora(tmp_path / "cat.safetensors").experts
    check_same(expected, read_lora(tmp_path / "dog.safetensors").experts)


@pytest.mark.parametrize("prefix", ["unet.", ""], ids=["prefix", "no prefix"])
def test_the_oldest_keys_and_their_alphas(tmp_path, prefix):
    base = "mid_block.attentions.0.transformer_blocks.0"
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    state = {}
    stems = {
        f"{base}.attn1.processor.to_q_lora": ("attn1.to_q", 3.0),
        f"{base}.attn2.processor.to_out_lora": ("attn2.to_out.0", 5.0),
        f"{base}.ff.net.2.lora": ("ff.net.2", None),
        f"{base}.attn1.to_k.lora": ("attn1.to_k", 0.5),
    }
    for number, (stem, (_, alpha)) in enumerate(stems.items()):
        state[f"{prefix}{stem}.down.weight"] = a + number
        state[f"{prefix}{stem}.up.weight"] = b - number
        if alpha:
            state[f"{prefix}{stem}.alpha"] = torch.tensor(alpha)
    state[f"{prefix}conv_in.lora.down.weight"] = torch.randn(2, 4, 3, 3)
    state[f"{prefix}conv_in.lora.up.weight"] = torch.randn(8, 2, 1, 1)
    state[f"{prefix}conv_in.alpha"] = torch.tensor(6.0)
    save_file(state, tmp_path / "dog.safetensors")
    layers = read_lora(tmp_path / "dog.safetensors").experts["unet"].layers
    assert len(layers) == 5
    for number, (path, alpha) in enumerate(stems.values()):
        expected = (alpha or 2) / 2 * (b - number) @ (a + number)
        torch.testing.assert_close(layers[f"{base}.{path}"].delta(), expected)
    down, up = (state[f"{prefix}conv_in.lora.{half}.weight"] for half in ("down", "up"))
    expected = 3 * torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
    torch.testing.assert_close(layers["conv_in"].delta(), expected)


@pytest.mark.parametrize("last", ["lora_linear_layer", "lora"])
def test_older_text_encoder_keys_and_their_alphas(tmp_path, last):
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    stems = {
        f"{LAYER}.self_attn.q_proj": f"{LAYER}.self_attn.q_proj.{last}",
        f"{LAYER}.self_attn.out_proj": f"{LAYER}.self_attn.to_out_lora",
        f"{LAYER}.mlp.fc1": f"{LAYER}.mlp.fc1.{last}",
        "text_projection": "text_projection.lora",
    }
    state = {}
    for number, (path, stem) in enumerate(stems.items()):
        state[f"text_encoder_2.{stem}.down.weight"] = a + number
        state[f"text_encoder_2.{stem}.up.weight"] = b - number
        state[f"text_encoder_2.{path}.alpha"] = torch.tensor(number + 1.0)
    save_file(state, tmp_path / "dog.safetensors")
    layers = read_lora(tmp_path / "dog.safetensors").experts["text_encoder_2"].layers
    assert layers.keys() == stems.keys()
    for number, path in enumerate(stems):
        expected = (number + 1) / 2 * (b - number) @ (a + number)
        torch.testing.assert_close(layers[path].delta(), expected)


# kohya's own


def test_kohyas_alphas_are_each_layers_own(tmp_path):
    a, b = torch.randn(4, 5), torch.randn(6, 4)
    base = f"lora_unet_{ATTENTION.replace('.', '_')}"
    state = {
        **kohya_pair(f"{base}_attn1_to_q", a, b, alpha=torch.tensor(1.0)),
        **kohya_pair(f"{base}_attn1_to_v", a, b, alpha=torch.tensor(6.0, dtype=torch.float16)),
        **kohya_pair(f"{base}_attn1_to_k", a, b),
        **kohya_pair(f"lora_te_text_model_{LAYER.replace('.', '_')}_mlp_fc2", a, b),
        **kohya_pair("lora_unet_add_embedding_linear_2", a, b, alpha=torch.tensor([2.0])),
    }
    save_file({key: part.clone() for key, part in state.items()}, tmp_path / "dog.safetensors")
    file = read_lora(tmp_path / "dog.safetensors")
    scales = {path: factors.scale for path, factors in file.experts["unet"].layers.items()}
    assert scales == {
        f"{ATTENTION}.attn1.to_q": 0.25,
        f"{ATTENTION}.attn1.to_v": 1.5,
        f"{ATTENTION}.attn1.to_k": 1.0,
        "add_embedding.linear_2": 0.5,
    }
    text = file.experts["text_encoder"].layers
    torch.testing.assert_close(text[f"text_model.{LAYER}.mlp.fc2"].delta(), b @ a)


def test_locons_core_is_the_plain_product(tmp_path):
    pixels = torch.nn.Conv2d(5, 3, 1, bias=False), torch.nn.Conv2d(3, 4, 1, bias=False)
    core = torch.nn.Conv2d(3, 3, 3, padding=1, bias=False)
    down, up = (layer.weight.detach() for layer in pixels)
    mid = {"lora_mid.weight": core.weight.detach(), "alpha": torch.tensor(2.0)}
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file(kohya_pair(name, down, up, **mid), tmp_path / "dog.safetensors")
    layers = read_lora(tmp_path / "dog.safetensors").experts["unet"].layers
    x = torch.randn(2, 5, 6, 6)
    made = torch.nn.functional.conv2d(x, layers["down_blocks.0.resnets.0.conv1"].delta(), padding=1)
    torch.testing.assert_close(made, 2 / 3 * pixels[1](core(pixels[0](x))))


@pytest.mark.parametrize(
    ("header", "triggers"),
    [
        ({"modelspec.trigger_phrase": "sks dog, it,", "ss_tag_frequency": "{}"}, ("sks dog", "it")),
        (
            {"ss_tag_frequency": json.dumps({"5_a": {"toy": 2, "sks ": 4}, "1_b": {"toy": 3}})},
            ("toy", "sks"),
        ),
        ({"ss_tag_frequency": "damaged"}, ()),
        ({}, ()),
    ],
)  # fmt: skip
def test_trigger_words(tmp_path, header, triggers):
    write_lora(one_layer(), tmp_path / "dog.safetensors", "kohya", metadata=header)
    assert read_lora(tmp_path / "dog.safetensors").triggers == triggers


# PEFT's folders


def test_a_plain_peft_folder_is_the_unets(tmp_path):
    expert = one_layer()["unet"]
    write_peft(expert, tmp_path / "cat")
    file = read_lora(tmp_path / "cat", name="dog")
    assert (file.form, file.experts.keys()) == ("peft", {"unet"})
    assert file.experts["unet"].name == "dog"
    check_same({"unet": expert}, file.experts)
    write_peft(expert, tmp_path / "all" / "transformer")
    (tmp_path / "all" / "unet").mkdir()
    with pytest.raises(ValueError, match="LoRAs of transformer, expected unet, text_encoder"):
        read_lora(tmp_path / "all")
    with pytest.raises(FileNotFoundError, match=r"holds no LoRA: expected adapter_config.json"):
        read_lora(tmp_path / "all" / "unet")
