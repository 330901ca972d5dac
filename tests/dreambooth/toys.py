"""A tiny Stable Diffusion, and folders of pictures."""

import json
import string

import numpy as np
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIDE = 16
LENGTH = 12


def tiny_tokenizer():
    """One token a letter."""
    letters = string.ascii_lowercase
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>"]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def tiny_pipeline(prediction="epsilon"):
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
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
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.7,
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
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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
