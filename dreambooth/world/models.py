"""The base's networks, at the size of the world: a Stable Diffusion of 15 M parameters."""

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth.world.render import SIZE

LATENT_CHANNELS = 8
LATENT_SIZE = SIZE // 4
TEXT_WIDTH = 192
# diffusers and transformers annotate less than they accept.
_Vae: Any = AutoencoderKL
_TextConfig: Any = CLIPTextConfig


def make_vae() -> AutoencoderKL:
    """Pictures (B, 3, 64, 64) to latents (B, 8, 16, 16). With 4 channels pictures stay blurred."""
    return _Vae(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def encode(vae: Any, pages: Tensor) -> Any:
    """The distribution (`mean`, `std`, `kl()`) of the latents (B, 8, 16, 16) of pages."""
    return vae.encode(pages).latent_dist


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pages (B, 3, 64, 64) of latents (B, 8, 16, 16)."""
    return vae.decode(latents).sample


def make_unet() -> UNet2DConditionModel:
    """Seven transformer blocks at 8 x 8 and 4 x 4; none at 16 x 16, where they cost most."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # for this class the number of heads, whatever the name says
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Token ids (B, 32) to states (B, 32, 192)."""
    config = _TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """v-prediction down to pure noise: the white page is a mean that a residue would give away.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
