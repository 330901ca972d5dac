"""LoRAs on every kind of layer, and how their files are compared."""

import torch
from safetensors.torch import load_file, save_file

from dreambooth.adapter import fitted_to
from mole_vl import mix
from mole_vl.gates import Sum
from tests.dreambooth.toys import random_expert, tiny_pipeline

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


def kohya_pair(name, a, b, **others):
    parts = {"lora_down.weight": a, "lora_up.weight": b, **others}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


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
