"""Gates of an SDXL's UNet, through the domain: pooled prompts and sizes go with every call."""

import pytest
import torch

from dreambooth.base import Base
from dreambooth.clip_task import ClipLoss
from dreambooth.subject_style import SubjectStyle
from mole_vl.gates import MoLE, Sigmoid
from mole_vl.training import FitConfig, Row, fit
from tests.dreambooth.kinds import reload, write_kind
from tests.dreambooth.test_clip_task import experts, write_clip
from tests.dreambooth.toys import SIDE, write_examples
from tests.toys import randomise


@pytest.fixture
def domain(tmp_path):
    base = Base.load(write_kind(tmp_path / "base", "sdxl"))
    experts(base.unet, tmp_path / "loras")
    return SubjectStyle(
        base=base.name,
        experts=[tmp_path / "loras/owl", tmp_path / "loras/ink"],
        prompt="an owl in ink",
        caption="an owl in ink style",
        negative="bad",
        pictures={name: write_examples(tmp_path / name, ["an owl"]) for name in ("owl", "ink")},
        ordinary=write_examples(tmp_path / "ordinary", ["a thing"] * 2),
        clip=write_clip(tmp_path / "clip"),
        resolution=SIDE,
        loss=ClipLoss(steps=3, guidance=2.0),
        drawn=2,
    )


def test_every_term_moves_every_gate(domain):
    mixture = domain.mix(MoLE(), "block")["unet"]
    randomise(mixture)
    task = domain.task(0.1)
    task.place(torch.device("cpu"))
    terms = task.losses(task.batch([Row(0, 0, index, 2) for index in range(2)]))
    for name, term in terms.items():
        grads = torch.autograd.grad(term.value, list(mixture.gates.parameters()), retain_graph=True)
        assert all(grad.abs().max() > 0 for grad in grads), name


def test_a_run_trains_the_gates_and_a_batch_equals_single_pictures(domain, tmp_path):
    mixture = domain.mix(MoLE(normaliser=Sigmoid()), "block")["unet"]
    before = [p.detach().clone() for p in mixture.gates.parameters()]
    fit(domain.task(0.0), FitConfig(output=tmp_path / "run", steps=2, rows=2, progress=False))
    assert all((a != b).any() for a, b in zip(before, mixture.gates.parameters(), strict=True))
    together = domain.draw(2, seed=5)
    torch.testing.assert_close(domain.draw(1, seed=5)[0], together[0], atol=1e-4, rtol=1e-4)


def test_without_its_experts_the_domain_draws_what_the_pipeline_does(domain, tmp_path):
    mixture = domain.mix(MoLE(), "block")["unet"]
    pipe = reload("sdxl", tmp_path / "base")
    noise = []
    domain.base.unet.register_forward_pre_hook(lambda _m, args: noise.append(args[0].detach()))
    with mixture.disabled():
        found = domain.draw(1, seed=5)
    expected = pipe(
        "an owl in ink", negative_prompt="bad", latents=noise[0][:1], num_inference_steps=3,
        guidance_scale=2.0, output_type="pt", height=SIDE, width=SIDE,
    ).images  # fmt: skip
    torch.testing.assert_close(found, expected * 2 - 1, atol=1e-3, rtol=1e-3)
