"""What gates were trained to draw is what a pipeline draws with them."""

import pytest
import torch
from diffusers import DDIMScheduler

from dreambooth.pairs import Pair, Pairs
from dreambooth.subject_style import SubjectStyle
from mole_vl import save_gates
from mole_vl.gates import Free, MoLE, Sigmoid
from pipelines import MoLEStableDiffusionPipeline
from tests.dreambooth.texts import given
from tests.pipelines.toys import differ, quiet
from tests.toys import randomise

READING = MoLE(normaliser=Sigmoid())


def trained(domain, folder, gate, site="block"):
    """A domain whose gates are as if trained, and saved."""
    for seed, (part, mixture) in enumerate(domain.mix(gate, site).items()):
        randomise(mixture, seed, size=2.0)
        save_gates(mixture, folder / f"{part}.safetensors")
    return domain


def drawn_by_the_pipeline(domain, experts, folder):
    """The domain's first picture, its noise taken from the domain's own drawing."""
    noise = []
    hook = domain.base.unet.register_forward_pre_hook(
        lambda _m, args: noise.append(args[0].detach())
    )
    expected = domain.draw(1, seed=5)
    hook.remove()
    pipe = quiet(MoLEStableDiffusionPipeline.from_pretrained(domain.base.name))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_experts(experts)
    pipe.load_gates(folder)
    found = pipe(
        domain.prompt, negative_prompt=domain.negative, latents=noise[0][:1],
        num_inference_steps=domain.steps, guidance_scale=domain.loss.guidance, output_type="pt",
    ).images  # fmt: skip
    return expected, found * 2 - 1, pipe


@pytest.mark.parametrize("speaking", [("owl", "ink"), ("ink",)])
@pytest.mark.parametrize(
    ("gate", "site"),
    [
        (READING, "block"),
        (MoLE(normaliser=Sigmoid(), over="position"), "matrix"),
        (MoLE(), "layer"),
        (MoLE(score=Free(), normaliser=Sigmoid()), "network"),
    ],
)
def test_a_picture_is_the_pipelines_own(tmp_path, gate, site, speaking):
    folder = tmp_path / "gates"
    domain = trained(SubjectStyle(**given(tmp_path, speaking)), folder, gate, site)
    expected, found, pipe = drawn_by_the_pipeline(domain, domain.expert_folders, folder)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert pipe.mixtures["text_encoder"].names == speaking


def test_a_pair_of_many_is_the_pipelines_own(tmp_path):
    settings = given(tmp_path, speaking=["owl"])
    pair = Pair(
        experts=dict(zip(("subject", "style"), settings.pop("experts"), strict=True)),
        prompt=settings.pop("prompt"),
        caption=settings.pop("caption"),
    )
    folder = tmp_path / "gates"
    part = trained(Pairs(pairs=[pair], **settings), folder, READING).parts[0]
    expected, found, pipe = drawn_by_the_pipeline(part, pair.experts, folder)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    randomise(pipe.mixtures["text_encoder"], seed=8, size=2.0)
    other = pipe(part.prompt, negative_prompt="bad", num_inference_steps=3, output_type="pt",
                 generator=torch.Generator().manual_seed(1))  # fmt: skip
    differ(other.images * 2 - 1, expected)
