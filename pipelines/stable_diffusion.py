"""Stable Diffusion 1.x, 2.x and XL that mix LoRAs."""

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from pipelines.mixed import Mixed


class MoLEStableDiffusionPipeline(Mixed, StableDiffusionPipeline):  # pyright: ignore
    """Stable Diffusion 1.x or 2.x with experts in UNet and text encoder.

    pipe = MoLEStableDiffusionPipeline.from_pretrained("worlds/emoji/base")
    pipe.load_experts(["worlds/emoji/loras/panda", "worlds/emoji/loras/retro"])
    pipe.load_gates("out/emoji/gates")
    picture = pipe("a <v1> mammal in <v2> style", strength=0.8).images[0]
    """


class MoLEStableDiffusionXLPipeline(Mixed, StableDiffusionXLPipeline):  # pyright: ignore
    """Stable Diffusion XL with experts in UNet and both text encoders."""
