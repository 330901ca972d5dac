"""A tiny Stable Diffusion, and folders of pictures."""

import json
import string

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from mole_vl import Expert, Factors

SIDE = 16
LENGTH = 12


def tiny_tokenizer():
    """One token a letter."""
    letters = string.ascii_lowercase
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>"]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def tiny_text_config(tokenizer, layers=1):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=10,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.7,
    )


def tiny_pipeline(prediction="epsilon"):
    tokenizer = tiny_tokenizer()
    text = tiny_text_config(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    v = prediction == "v_prediction"
    # The older SD 1.x name PNDM; a base of v often goes down to no signal at all.
    scheduler = (
        DDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            clip_sample=False,
            steps_offset=1,
        )
        if v
        else PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_xl_pipeline():
    """A tiny SDXL: two text encoders, the second with a projection."""
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer, layers=2)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )


def random_expert(model, paths, name="dog", alphas=(1.0, 3.0), ranks=(2, 3), size=0.3):
    """An expert with random factors at these layers, ranks and alphas in turn."""
    layers = {}
    for number, path in enumerate(paths):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        out, *into = model.get_submodule(path).weight.shape
        a, b = torch.randn(rank, *into) * size, torch.randn(out, rank) * size
        layers[path] = Factors(a, b, alpha / rank)
    return Expert(name, layers)


def write_base(folder, prediction="epsilon"):
    tiny_pipeline(prediction).save_pretrained(folder)
    return str(folder)


def write_picture(file, seed=0, size=(SIDE, SIDE)):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def write_examples(folder, captions):
    """A folder of random pictures with these captions, each a picture of its own."""
    lines = []
    for number, text in enumerate(captions):
        write_picture(folder / f"{number}.png", seed=number)
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
