"""LoRA files against diffusers itself, in the three formats."""

import copy
import json
import re

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth.adapter import fitted_to
from dreambooth.lora_files import read_lora, write_lora
from mole_vl import Expert, Factors, mix, write_peft
from mole_vl.gates import Sum
from tests.dreambooth.toys import random_expert, tiny_pipeline, tiny_xl_pipeline

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET = (
    "conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2",
    "down_blocks.0.resnets.0.time_emb_proj", "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv", "down_blocks.1.attentions.0.proj_in",
    f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn1.to_out.0", f"{ATTENTION}.attn2.to_k",
    f"{ATTENTION}.attn2.to_v", f"{ATTENTION}.ff.net.0.proj", f"{ATTENTION}.ff.net.2",
    "mid_block.attentions.0.proj_out", "up_blocks.0.upsamplers.0.conv",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v", "time_embedding.linear_1",
)  # fmt: skip
LAYER = "encoder.layers.0"
TEXT = tuple(
    f"{LAYER}.{layer}"
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
                  "mlp.fc1", "mlp.fc2")
)  # fmt: skip
PLACES = {"peft": "dog", "diffusers": "dog.safetensors", "kohya": "dog.safetensors"}
# In turn, so that neighbouring layers differ.
ALPHAS = (1.0, 3.0, 5.0, 0.7)


def two_parts(pipe, text=TEXT, **settings):
    return {
        "unet": random_expert(pipe.unet, UNET, **settings),
        "text_encoder": random_expert(pipe.text_encoder, text, **settings),
    }


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    made = pipe("a dog", num_inference_steps=2, generator=generator, output_type="latent")
    return made.images


def mixed(pipe, file):
    """The pipeline with a mixture of the one expert of a file."""
    for component, expert in file.experts.items():
        model = getattr(pipe, component)
        mix(model, [fitted_to(expert, model)], gate=Sum(), site="matrix")
    return pipe


def check_same(experts, again, **tolerance):
    """The same updates of the same layers, text encoders' by their names without prefix."""
    assert again.keys() == experts.keys()
    for component, expert in experts.items():
        found = {p.removeprefix("text_model."): f for p, f in again[component].layers.items()}
        expected = {p.removeprefix("text_model."): f for p, f in expert.layers.items()}
        assert found.keys() == expected.keys()
        for path, factors in expected.items():
            torch.testing.assert_close(found[path].delta(), factors.delta(), **tolerance)


def one_layer(path=f"{ATTENTION}.attn1.to_q", **settings):
    return {"unet": random_expert(tiny_pipeline().unet, [path], **settings)}


def edited(file, **changes):
    """The file with tensors added, replaced, or (None) left out."""
    tensors = {**load_file(file), **changes}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    return file


# The three forms


@pytest.mark.parametrize("form", PLACES)
def test_each_form_is_read_back_to_the_same_updates(tmp_path, form):
    experts = two_parts(tiny_pipeline(), alphas=ALPHAS)
    write_lora(experts, tmp_path / PLACES[form], form)
    again = read_lora(tmp_path / PLACES[form])
    assert (again.form, again.triggers) == (form, ())
    assert {part.name for part in again.experts.values()} == {"dog"}
    check_same(experts, again.experts)
    if form != "kohya":
        for component, expert in experts.items():
            fitted = again.experts[component].renamed({f"text_model.{p}": p for p in TEXT})
            assert fitted.digest == expert.digest


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("alphas", [(1.5,), ALPHAS], ids=["one alpha", "many alphas"])
def test_diffusers_makes_of_our_files_the_picture_that_our_mixture_makes(tmp_path, form, alphas):
    pipe = tiny_pipeline()
    write_lora(two_parts(pipe, alphas=alphas), tmp_path / "dog.safetensors", form)
    plain, ours = copy.deepcopy(pipe), copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog.safetensors"))
    expected = picture(plain)
    assert (expected - picture(pipe)).abs().max() > 0.05
    made = picture(mixed(ours, read_lora(tmp_path / "dog.safetensors")))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_is_loaded_by_diffusers_too(tmp_path):
    pipe = tiny_pipeline()
    experts = two_parts(pipe)
    write_lora(experts, tmp_path / "dog", "diffusers", metadata={"note": "of one dog"})
    again = read_lora(tmp_path / "dog")
    check_same(experts, again.experts)
    inside = read_lora(tmp_path / "dog" / "pytorch_lora_weights.safetensors")
    assert inside.experts["unet"].digest == again.experts["unet"].digest
    assert inside.experts["unet"].name == "dog"
    assert again.experts["unet"].name == "dog"
    with safe_open(tmp_path / "dog" / "pytorch_lora_weights.safetensors", "pt") as opened:
        assert opened.metadata()["note"] == "of one dog"
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog"))
    torch.testing.assert_close(picture(plain), picture(mixed(pipe, again)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", [TEXT[:1], (TEXT[1], TEXT[4])], ids=["q", "k and feed-forward"])
def test_a_text_encoder_without_out_proj_reaches_diffusers_in_kohyas_form(tmp_path, text):
    pipe = tiny_pipeline()
    experts = two_parts(pipe, text=text)
    write_lora(experts, tmp_path / "dog.safetensors", "kohya")
    again = read_lora(tmp_path / "dog.safetensors")
    check_same(experts, again.experts)
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog.safetensors"))
    torch.testing.assert_close(picture(plain), picture(mixed(pipe, again)), rtol=1e-4, atol=1e-4)


def test_a_type_of_16_bits_is_kept_to_its_precision(tmp_path):
    experts = two_parts(tiny_pipeline())
    for form, place in PLACES.items():
        file = tmp_path / form / place
        write_lora(experts, file, form, dtype=torch.float16)
        again = read_lora(file).experts
        assert {f.a.dtype for f in again["unet"].layers.values()} == {torch.float16}
        check_same(experts, again, rtol=0.01, atol=2e-3)


def test_the_base_is_kept(tmp_path):
    expert = Expert("dog", one_layer()["unet"].layers, base="some/base")
    for form, place in PLACES.items():
        write_lora({"unet": expert}, tmp_path / form / place, form)
        assert read_lora(tmp_path / form / place).experts["unet"].base == "some/base", form


# SDXL

SGM = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_5_1_transformer_blocks_1_attn1_to_q": (
        "down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q"
    ),
    "input_blocks_5_1_transformer_blocks_0_ff_net_0_proj": (
        "down_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_attn2_to_k": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0": (
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0"
    ),
    "output_blocks_0_1_proj_in": "up_blocks.0.attentions.0.proj_in",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}
TEXT_XL = tuple(path.replace(".0.", ".1.", 1) for path in TEXT)


def xl_parts(pipe, **settings):
    second = [*(f"text_model.{path}" for path in TEXT_XL), "text_projection"]
    return {
        "unet": random_expert(pipe.unet, SGM.values(), **settings),
        "text_encoder": random_expert(pipe.text_encoder, TEXT_XL, **settings),
        "text_encoder_2": random_expert(pipe.text_encoder_2, second, **settings),
    }


def in_sgm_names(file):
    names = {f"lora_unet_{path.replace('.', '_')}": f"lora_unet_{sgm}" for sgm, path in SGM.items()}
    renamed = {}
    for key, tensor in load_file(file).items():
        name, _, part = key.partition(".")
        renamed[f"{names.get(name, name)}.{part}"] = tensor
    save_file(renamed, file)


def test_sdxl_in_sgm_names_is_read_as_diffusers_reads_it(tmp_path):
    pipe = tiny_xl_pipeline()
    # diffusers takes a text_projection's rank from the other layers': all have one.
    experts = xl_parts(pipe, alphas=(1.5,), ranks=(2,))
    file = tmp_path / "dog.safetensors"
    write_lora(experts, file, "kohya")
    assert {key.split("_")[1] for key in load_file(file)} == {"unet", "te1", "te2"}
    in_sgm_names(file)
    with pytest.raises(ValueError, match=r"is a name of the sgm UNet.*give `unet_config`"):
        read_lora(file)
    again = read_lora(file, unet_config=pipe.unet.config)
    check_same(experts, again.experts)
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(file))
    torch.testing.assert_close(picture(plain), picture(mixed(pipe, again)), rtol=1e-4, atol=1e-4)


def test_sdxl_in_diffusers_form_and_names(tmp_path):
    pipe = tiny_xl_pipeline()
    experts = xl_parts(pipe, alphas=ALPHAS)
    write_lora(experts, tmp_path / "dog.safetensors", "diffusers")
    again = read_lora(tmp_path / "dog.safetensors")
    check_same(experts, again.experts)
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog.safetensors"))
    torch.testing.assert_close(picture(plain), picture(mixed(pipe, again)), rtol=1e-4, atol=1e-4)
    write_lora(experts, tmp_path / "cat.safetensors", "kohya")
    check_same(experts, read_lora(tmp_path / "cat.safetensors").experts)


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


def kohya_pair(name, a, b, **others):
    parts = {"lora_down.weight": a, "lora_up.weight": b, **others}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


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


# Paths


def test_text_encoders_paths_are_fitted_to_the_model_at_hand():
    pipe = tiny_xl_pipeline()
    experts = xl_parts(pipe)
    bare, full = experts["text_encoder"], experts["text_encoder_2"]
    assert fitted_to(bare, pipe.text_encoder) is bare
    assert fitted_to(full, pipe.text_encoder_2) is full
    there = bare.renamed({path: f"text_model.{path}" for path in bare.layers})
    assert fitted_to(there, pipe.text_encoder).digest == bare.digest
    back = full.renamed({path: path.removeprefix("text_model.") for path in full.layers})
    assert fitted_to(back, pipe.text_encoder_2).digest == full.digest
    assert fitted_to(experts["unet"], pipe.text_encoder) is experts["unet"]


# What is refused

KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
DIFFUSERS = "unet.mid_block.attentions.0.proj_in"
ONES = torch.ones(2, 2)
PAIR = kohya_pair(KOHYA, ONES, ONES)
PEFT_PAIR = {f"{DIFFUSERS}.lora_A.weight": ONES, f"{DIFFUSERS}.lora_B.weight": ONES}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is empty"),
        ({"model.weight": ONES}, "the key 'model.weight' is not used; expected LoRA factors"),
        ({**PAIR, f"{KOHYA}.dora_scale": ONES}, f"'{KOHYA}.dora_scale' is of DoRA"),
        ({f"{KOHYA}.hada_w1_a": ONES}, f"'{KOHYA}.hada_w1_a' is of LoHa"),
        ({f"{KOHYA}.lokr_w1": ONES}, "is of LoKr"),
        ({f"{KOHYA}.oft_blocks": ONES}, "is of OFT"),
        ({**PAIR, f"{KOHYA}.diff": ONES}, "is of a full difference"),
        ({**PEFT_PAIR, f"{DIFFUSERS}.lora_magnitude_vector": ONES}, "is of DoRA"),
        ({**PAIR, f"{KOHYA}.scalar": ONES}, f"the key '{KOHYA}.scalar' is not used"),
        ({**PAIR, **PEFT_PAIR}, f"the key '{DIFFUSERS}.lora_A.weight' is not used"),
        ({**PAIR, "lora_te3_x.alpha": ONES}, "the key 'lora_te3_x.alpha' is not used"),
        ({f"{KOHYA}.lora_down.weight": ONES}, "proj_in has A alone, expected both factors"),
        ({f"{DIFFUSERS}.lora_B.weight": ONES}, "proj_in has B alone, expected both factors"),
        ({f"{KOHYA}.alpha": ONES}, "proj_in has alpha alone"),
        ({**PAIR, f"{KOHYA}.alpha": ONES}, r"has the alpha \[\[1.0, 1.0\]"),
        ({**PAIR, f"{KOHYA}.alpha": torch.tensor(float("inf"))}, "has the alpha inf"),
        ({**PAIR, f"{KOHYA}.lora_up.weight": torch.ones(2, 3)}, r"shapes \(2, 2\) and \(2, 3\)"),
        ({**PAIR, f"{KOHYA}.lora_mid.weight": torch.ones(2, 2)}, r"lora_mid of shape \(2, 2\)"),
        ({**PAIR, f"{KOHYA}.lora_up.weight": ONES.int()}, "factor B of torch.int32"),
        ({**PAIR, f"{KOHYA}.lora_up.weight": ONES / 0}, "factor b of mid_block.*NaN or infinite"),
        ({**PEFT_PAIR, f"{DIFFUSERS}.lora_B.bias": ONES}, "lora_B.bias' is not used"),
        ({"transformer.x.lora_A.weight": ONES}, "the key 'transformer.x.lora_A.weight'"),
        (kohya_pair("lora_unet_double_blocks_0_img_attn_qkv", ONES, ONES), "names no layer of a"),
        (kohya_pair("lora_unet_output_blocks", ONES, ONES), "names no layer of a Stable"),
        (kohya_pair("lora_te_model_resblocks_0", ONES, ONES), "Diffusion's text_encoder"),
        (
            kohya_pair("lora_te_text_projection", ONES, ONES)
            | kohya_pair("lora_te1_text_projection", ONES, ONES),
            "names text_encoder's text_projection a second time",
        ),
        (
            {**PEFT_PAIR, f"{DIFFUSERS}.lora.down.weight": ONES},
            "names unet's mid_block.attentions.0.proj_in a second time",
        ),
        (kohya_pair("lora_te_text_model_encoder_layers_0_self_attn_out_proj", ONES * 0, ONES * 0),
         "changes no layer"),
    ],
)  # fmt: skip
def test_files_beyond_plain_lora_are_refused_with_file_and_key(tmp_path, tensors, message):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/a.safetensors.*{message}"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "lora_adapter_metadata is no JSON"),
        ("[]", "lora_adapter_metadata is no table"),
        ('{"unet.peft_type": "LOHA"}', "unet's lora_adapter_metadata: peft_type is 'LOHA'"),
        (
            '{"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 1, "unet.use_dora": true}',
            "use_dora = True is not supported",
        ),
        ('{"unet.peft_type": "LORA", "unet.r": 3, "unet.lora_alpha": 1}', "expected rank 3"),
    ],
)
def test_configs_in_the_header_are_checked(tmp_path, config, message):
    file = tmp_path / "a.safetensors"
    tensors = {key: tensor.clone() for key, tensor in PEFT_PAIR.items()}
    save_file(tensors, file, metadata={LORA_ADAPTER_METADATA_KEY: config})
    with pytest.raises(ValueError, match=f"a.safetensors.*{message}"):
        read_lora(file)
    settings = '{"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 1}'
    tensors[f"{DIFFUSERS}.alpha"] = torch.tensor(1.0)
    save_file(tensors, file, metadata={LORA_ADAPTER_METADATA_KEY: settings})
    with pytest.raises(ValueError, match="alphas both as keys and in lora_adapter_metadata"):
        read_lora(file)


def test_damaged_files_and_pickles_are_named(tmp_path):
    file = tmp_path / "dog.safetensors"
    write_lora(one_layer(), file, "kohya")
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], b"\x10" * 50):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"dog.safetensors is damaged or no safetensors file"):
            read_lora(file)
    for suffix in ("bin", "pt", "ckpt"):
        with pytest.raises(ValueError, match=f"dog.{suffix} is a pickle, which can run code"):
            read_lora(tmp_path / f"dog.{suffix}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_lora_weights.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_lora_weights.bin is a pickle"):
        read_lora(tmp_path / "old")
    with pytest.raises(FileNotFoundError, match=r"cat.safetensors is missing"):
        read_lora(tmp_path / "cat.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "lycoris"}, "form is 'lycoris', expected one of peft, diffusers, kohya"),
        ({"experts": {}}, "no experts"),
        ({"experts": {"vae": None}}, "component is 'vae', expected one of unet"),
        ({"path": "dog"}, "dog is not .safetensors"),
        ({"form": "peft"}, "dog.safetensors is a file, expected a folder"),
        ({"metadata": {"format": "np"}}, "metadata holds 'format'"),
        ({"metadata": {"steps": 3}}, "metadata 'steps' is 3, expected text"),
        ({"dtype": torch.float16}, "as torch.float16: factor b of .* holds NaN or infinite"),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, changes, message):
    path = f"{ATTENTION}.attn1.to_q"
    good = one_layer(path)
    wide = Factors(good["unet"].layers[path].a, good["unet"].layers[path].b * 1e8, 1.0)
    file = tmp_path / "dog.safetensors"
    write_lora(good, file, "kohya")
    before = file.read_bytes()
    asked = {"experts": {"unet": Expert("dog", {path: wide})}, "path": file, "form": "kohya"}
    asked |= changes
    asked["path"] = tmp_path / asked["path"]
    with pytest.raises(ValueError, match=message):
        write_lora(**asked)
    assert [child.name for child in tmp_path.iterdir()] == ["dog.safetensors"]
    assert file.read_bytes() == before


def test_a_fault_in_the_midst_of_a_write_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr("dreambooth.lora_files.save_file", fails)
    monkeypatch.setattr("mole_vl.peft_folder.save_file", fails)
    for form, place in PLACES.items():
        with pytest.raises(OSError, match="no space"):
            write_lora(one_layer(), tmp_path / place, form)
        assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    write_lora(one_layer(), tmp_path / "dog", "peft")
    write_lora(one_layer(), tmp_path / "dog", "peft")
    (tmp_path / "dog" / "letters").mkdir()
    with pytest.raises(ValueError, match="dog holds letters, which is no part of a LoRA"):
        write_lora(one_layer(), tmp_path / "dog", "peft")
    odd = Expert("dog", {"conv_in.my_layer": Factors(ONES, ONES, 1.0)})
    with pytest.raises(
        ValueError, match=r"names no layer of a Stable Diffusion's unet|no name for"
    ):
        write_lora({"unet": odd}, tmp_path / "odd.safetensors", "kohya")
    assert not (tmp_path / "odd.safetensors").exists()


def test_folding_beyond_16_bits_is_refused(tmp_path):
    half = torch.full((2, 2), 6e4, dtype=torch.float16)
    path = f"{ATTENTION}.attn1.to_"
    layers = {f"{path}q": Factors(half, half, 1.0), f"{path}k": Factors(half, half, 2.0)}
    with pytest.raises(ValueError, match=r"factor b of .* NaN or infinite"):
        write_lora({"unet": Expert("dog", layers)}, tmp_path / "dog.safetensors", "kohya")
