"""What mixing costs at the size of Stable Diffusion 1.5: time, memory, parameters of the gates.

    python benchmarks/full_size.py            # 512 pixels
    python benchmarks/full_size.py --quick    # 128 pixels, two steps, for a look

The network has SD 1.5's shapes and random weights (what it draws is noise, what it costs is the
same), two LoRAs of rank 16 on to_q and to_v, and a ViT-B/32 as the CLIP of the loss; all in fp32
on the CPU. Each measure runs in a process of its own, which reads the base from a folder (4 GB,
removed in the end), so that its peak of memory is its own:

- one picture under guidance by diffusers' pipeline, and by ours with gates that are constants
  (Free) or read (Hidden), one a block; of the first step, which warms up, only the picture's time
  knows;
- one training step of gates that read, with one row: the gradient passes one call of the network
  (no calls before it), the VAE's decoding and CLIP, with activation checkpointing in UNet and VAE;
- how many parameters the gates of the UNet have. The MoLE authors' have 34.6 M for three experts
  at 512 pixels: the number of experts times what the hidden states of all blocks count, flattened.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from costs import alone, clocks
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth.adapter import blocks
from dreambooth.base import Base
from dreambooth.clip_task import ClipLoss
from dreambooth.grid import to_image
from dreambooth.subject_style import SubjectStyle
from mole_vl import Expert, Factors, mix, read_peft, write_peft
from mole_vl.domain import prepare
from mole_vl.gates import Free, Hidden, MoLE, Sigmoid
from mole_vl.targets import target_layers
from mole_vl.training import FitConfig, fit
from pipelines import MoLEStableDiffusionPipeline
from results import FOLDER, ROOT, Measurement, measured, write_results

RANK, ALPHA = 16, 27
TARGETS = ("to_q", "to_v")
EXPERTS = ("dog", "ink", "hat")
CLIP = "ViT-B-32"
GATES = {
    "Free": MoLE(score=Free(), normaliser=Sigmoid()),
    "Hidden": MoLE(score=Hidden(), normaliser=Sigmoid()),
}
PLAIN = "plain"
TRAINED = "Hidden"
PROMPT = "a photo of a dog in ink"


def tokenizer() -> CLIPTokenizer:
    """CLIP's own, of the vocabulary that open_clip brings along."""
    given: Any = open_clip.get_tokenizer(CLIP)
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary: Any = {ends.get(piece, piece): index for piece, index in given.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(given.bpe_ranks), model_max_length=77)


def write_base(folder: Path) -> UNet2DConditionModel:
    """A Stable Diffusion 1.5 with random weights; settings as published."""
    words: Any = tokenizer()
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        pad_token_id=words.pad_token_id,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=(128, 256, 512, 512),  # pyright: ignore[reportArgumentType]
        layers_per_block=2,
        sample_size=512,
    )
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return unet


def write_parts(folder: Path, resolution: int) -> None:
    """The base, LoRAs for its UNet, the CLIP, and a picture of each LoRA."""
    torch.manual_seed(0)
    unet = write_base(folder / "base")
    for name in EXPERTS:
        layers = {}
        for path, layer in target_layers(unet, TARGETS).items():
            out, into = layer.get_parameter("weight").shape
            a, b = torch.randn(RANK, into) / into**0.5, torch.randn(out, RANK) * 0.01
            layers[path] = Factors(a, b, ALPHA / RANK)
        write_peft(Expert(name, layers), folder / name / "unet")
        (folder / "pictures" / name).mkdir(parents=True)
        picture = torch.rand(3, resolution, resolution) * 2 - 1
        to_image(picture).save(folder / "pictures" / name / "0.png")
    clip: Any = open_clip.create_model(CLIP, pretrained=None)
    (folder / "clip").mkdir()
    colours = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": open_clip.get_model_config(CLIP), "preprocess_cfg": colours}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.state_dict(), folder / "clip/open_clip_model.safetensors")


def drawn(folder: Path, kind: str, resolution: int, steps: int) -> dict[str, Any]:
    """Draw one picture, plainly or under gates.

    Returns:
        Seconds (clock, CPU) of the `picture` and of each of the `steps` but the first; `bytes` of
        what the mixture adds.
    """
    pipeline: Any = StableDiffusionPipeline if kind == PLAIN else MoLEStableDiffusionPipeline
    pipe = pipeline.from_pretrained(folder / "base", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    added = 0
    if kind != PLAIN:
        pipe.load_experts([folder / name for name in EXPERTS[:2]], gate=GATES[kind])
        mixture = pipe.mixtures["unet"]
        every = [*mixture.gates.parameters()]
        every += [factor for layer in mixture.layers.values() for factor in (layer.a, layer.b)]
        added = sum(tensor.numel() * tensor.element_size() for tensor in every)
    stamps = [clocks()]

    def stamp(_pipe: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        stamps.append(clocks())
        return given

    pipe(
        PROMPT,
        negative_prompt="blurred",
        height=resolution,
        width=resolution,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=stamp,
    )
    picture = clocks() - stamps[0]
    return {"picture": picture, "steps": np.diff(stamps[1:], axis=0), "bytes": added}


def trained(folder: Path, kind: str, resolution: int) -> np.ndarray:
    """Seconds (clock, CPU) of one training step of gates, with one row."""
    domain = SubjectStyle(
        base=str(folder / "base"),
        experts=[folder / name for name in EXPERTS[:2]],
        prompt=PROMPT,
        caption=PROMPT,
        pictures={name: folder / "pictures" / name for name in EXPERTS[:2]},
        ordinary=folder / "pictures" / EXPERTS[2],
        clip=f"local-dir:{folder / 'clip'}",
        resolution=resolution,
        loss=ClipLoss(first=0.0, last=0.0, through=1),
        checkpointing=True,
    )
    config = FitConfig(output=folder / f"run {kind}", steps=1, rows=1, progress=False)
    mixtures, task, _ = prepare(domain, GATES[kind], config, centring=0)
    before = [weight.detach().clone() for weight in mixtures["unet"].gates.parameters()]
    start = clocks()
    fit(task, config)
    seconds = clocks() - start
    assert any(
        bool((new != old).any())
        for new, old in zip(mixtures["unet"].gates.parameters(), before, strict=True)
    )
    return seconds


def gate_sizes(folder: Path) -> list[Measurement]:
    """Parameters of the gates of the UNet's blocks."""
    unet = Base.load(str(folder / "base")).unet
    found = []
    for count in (2, 3):
        experts = [read_peft(folder / name / "unet", name) for name in EXPERTS[:count]]
        for kind, gate in GATES.items():
            mixture = mix(unet, experts, gate=gate, blocks=blocks(unet))
            size = sum(weight.numel() for weight in mixture.gates.parameters())
            found.append(measured(f"gate parameters, {count} experts", kind, [size]))
            mixture.unmix()
    return found


def drawing_rows(folder: Path, resolution: int, steps: int) -> list[Measurement]:
    """Pictures, plain and mixed."""
    rows, plain = [], np.empty(0)
    for kind in (PLAIN, *GATES):
        found, peak = alone(drawn, folder, kind, resolution, steps)
        wall, cpu = found["steps"].T
        plain = cpu if kind == PLAIN else plain
        rows.append(measured("seconds of a picture", kind, [found["picture"][0]]))
        rows.append(measured("seconds a step", kind, wall))
        rows.append(measured("CPU seconds a step", kind, cpu))
        if kind != PLAIN:
            rows.append(measured("CPU seconds a step, over plain's", kind, cpu / plain))
            rows.append(measured("MiB of factors and gates", kind, [found["bytes"] / 2**20]))
        rows.append(measured("peak GiB of drawing", kind, [peak]))
        print(f"drawn, {kind}: {cpu.mean():.1f} CPU seconds a step, {peak:.1f} GiB", flush=True)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=3, help="sampler steps of a picture")
    parser.add_argument("--quick", action="store_true", help="128 pixels, for a look")
    options = parser.parse_args()
    resolution, steps = (128, 2) if options.quick else (512, options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(write_parts, folder, resolution)
        rows = drawing_rows(folder, resolution, steps)
        rows += alone(gate_sizes, folder)[0]
        (wall, cpu), peak = alone(trained, folder, TRAINED, resolution)
        rows.append(measured("seconds of a training step", TRAINED, [wall]))
        rows.append(measured("CPU seconds of a training step", TRAINED, [cpu]))
        rows.append(measured("peak GiB of training", TRAINED, [peak]))
    settings = {
        "resolution": resolution,
        "sampler steps": steps,
        "precision": "fp32",
        "threads": torch.get_num_threads(),
        # glibc's: at 0 its peaks are a little higher.
        "MALLOC_MMAP_MAX_": os.environ.get("MALLOC_MMAP_MAX_"),
        "LoRAs": {"rank": RANK, "targets": TARGETS, "mixed": 2},
        "training": {"rows": 1, "calls with gradient": 1, "views": ClipLoss().views, "clip": CLIP},
        "quick": options.quick,
    }
    results = ROOT / "out/benchmarks" if options.quick else FOLDER
    write_results("full_size", rows, settings=settings, seeds=[0], folder=results)


if __name__ == "__main__":
    main()
