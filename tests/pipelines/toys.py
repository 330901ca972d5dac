"""Tiny pipelines with tiny LoRAs, and the plain pipelines that they are held against."""

import functools

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mole_vl import Expert, Factors
from mole_vl.gates import Hidden, MoLE, Softmax
from pipelines import MoLEStableDiffusionPipeline, MoLEStableDiffusionXLPipeline
from tests.dreambooth.toys import LENGTH, tiny_tokenizer

STEPS = 3
READING = MoLE(score=Hidden(), normaliser=Softmax())


def text_config(tokenizer, **changes):
    return CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **changes,
        }
    )


def tiny_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def tiny_unet(**changes):
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        **{"cross_attention_dim": 12, **changes},
    )


def scheduler(**changes):
    return DDIMScheduler(clip_sample=False, steps_offset=1, **changes)


def sd1(kind=MoLEStableDiffusionPipeline):
    torch.manual_seed(7)
    tokenizer = tiny_tokenizer()
    return quiet(
        kind(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            unet=tiny_unet().eval(),
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sd2(kind=MoLEStableDiffusionPipeline):
    """v-prediction down to no signal, OpenCLIP's text encoder, padding that is no end token."""
    pipe = sd1(kind)
    pipe.tokenizer.pad_token = "a</w>"
    pipe.text_encoder = CLIPTextModel(text_config(pipe.tokenizer, hidden_act="gelu")).eval()
    pipe.unet = tiny_unet(use_linear_projection=True).eval()
    pipe.scheduler = scheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    return pipe


def sdxl(kind=MoLEStableDiffusionXLPipeline):
    torch.manual_seed(7)
    tokenizer = tiny_tokenizer()
    return quiet(
        kind(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(text_config(tokenizer)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(
                text_config(tokenizer, hidden_size=8, projection_dim=6, hidden_act="gelu")
            ).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer(),
            unet=tiny_unet(
                cross_attention_dim=20,
                addition_embed_type="text_time",
                addition_time_embed_dim=2,
                projection_class_embeddings_input_dim=6 * 2 + 6,
                use_linear_projection=True,
            ).eval(),
            scheduler=scheduler(),
        )
    )


PLAIN = {
    MoLEStableDiffusionPipeline: StableDiffusionPipeline,
    MoLEStableDiffusionXLPipeline: StableDiffusionXLPipeline,
}
BASES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lora(model, name, seed, ends=("to_q", "to_v", "ff.net.2", "q_proj", "v_proj"), rank=2):
    """A LoRA of a model with a good deal to say."""
    noise = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=noise)
    layers = {
        path: Factors(draw(rank, module.in_features), draw(module.out_features, rank), 0.5)
        for path, module in model.named_modules()
        if path.endswith(ends) and isinstance(module, torch.nn.Linear)
    }
    return Expert(name, layers)


def loras(pipe, parts=("unet",), names=("ann", "bob")):
    """LoRAs over some parts; by default over the UNet alone."""
    return [
        {part: lora(getattr(pipe, part), name, 10 * i + len(part)) for part in parts}
        for i, name in enumerate(names)
    ]


TEXT = ("unet", "text_encoder")


def parts_of(pipe):
    return tuple(p for p in (*TEXT, "text_encoder_2") if getattr(pipe, p, None) is not None)


def randomise(pipe, scale=8.0):
    """Gates that differ by what they read."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mixture in pipe.mixtures.values():
            for parameter in mixture.gates.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))
    return pipe


def mixed(base=sd1, parts=("unet",), gate=READING, names=("ann", "bob"), **settings):
    pipe = base()
    pipe.load_experts(loras(pipe, parts, names), gate=gate, **settings)
    return randomise(pipe)


@torch.no_grad()
def folded(base, experts, weights):
    """A plain pipeline with constant sums of updates folded into its layers."""
    pipe = base(PLAIN[type(base())])
    for parts in experts:
        for part, expert in parts.items():
            for path, factors in expert.layers.items():
                weight = getattr(pipe, part).get_submodule(path).weight
                weight += weights.get(expert.name, 0.0) * factors.delta()
    return pipe


def draw(pipe, prompt="a cat", seeds=(0,), **call):
    """Latents of pictures, each from its own generator."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent", **call}
    return pipe(prompt, generator=generators, **call).images


def same(one, other):
    torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


def differ(one, other):
    assert (one - other).abs().max() > 1e-2
