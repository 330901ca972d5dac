"""The benchmark's other side: the loss that judges every step of the sampler."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth.adapter import blocks
from dreambooth.base import Base
from dreambooth.clip import Clip
from dreambooth.clip_task import ClipLoss, ClipTask, Scene
from dreambooth.goals import Goals
from mole_vl import mix
from mole_vl.gates import Free, MoLE, Sigmoid
from mole_vl.training.rows import rows_of_step
from tests.dreambooth.test_clip_task import experts, write_clip
from tests.dreambooth.toys import SIDE, write_base
from tests.toys import randomise

STEPS = 3


@pytest.fixture
def authors(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("authors_loss")


def test_it_is_the_mean_of_our_losses_at_every_step_through_its_own_call(authors, tmp_path):
    base = Base.load(write_base(tmp_path / "base", "v_prediction"))
    gate = MoLE(score=Free(), normaliser=Sigmoid())
    mixture = mix(base.unet, experts(base.unet), gate=gate, blocks=blocks(base.unet))
    randomise(mixture)
    parameters = dict(mixture.gates.named_parameters())
    clip = Clip(write_clip(tmp_path / "clip"))
    with torch.no_grad():
        states = base.encode_prompts(["bad", "an owl"])
    goals = Goals(*(torch.randn(8) for _ in range(3)), torch.randn(2, 8), torch.empty(0, 8))
    scene = Scene(states, goals, torch.empty(0, 3, SIDE, SIDE))
    loss = ClipLoss(steps=STEPS, guidance=2.0, last=1.0, through=1, views=2)

    def task(kind):
        return kind(base, mixture, [scene], SIDE, clip, loss, parameters=parameters)

    def value(task, batch):
        return sum(term.value for term in task.losses(batch).values())

    ours, theirs = task(ClipTask), task(authors.AuthorsTask)
    batch = ours.batch(rows_of_step(0, 0, 2))
    found = value(theirs, replace(batch, upto=0))
    expected = sum(value(ours, replace(batch, upto=step)) for step in range(STEPS)) / STEPS
    torch.testing.assert_close(found, expected)
    every = list(parameters.values())
    for one, other in zip(
        torch.autograd.grad(found, every), torch.autograd.grad(expected, every), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_a_run_that_never_arrives_counts_with_its_last_second(authors):
    ours = authors.Course([0, 5, 10], [0.0, 10.0, 20.0], [0.0, 9.0, 18.0], [0.5, 0.691, 0.7])
    short = authors.Course([0, 5, 10], [0.0, 60.0, 120.0], [0.0, 54.0, 108.0], [0.5, 0.6, 0.68])
    there = authors.Course([0, 5, 10], [0.0, 60.0, 120.0], [0.0, 54.0, 108.0], [0.5, 0.691, 0.6])
    courses = [{authors.OURS: ours, authors.THEIRS: other} for other in (short, there)]
    rows = {(row.measure, row.arm): row.mean for row in authors.reaching(courses)}
    assert rows["share of pairs that reach the target", authors.THEIRS] == 0.5
    assert rows["seconds to the target, at least", authors.THEIRS] == 90
    # The target is 0.69: ours arrives at its second look.
    name = "ratio of seconds to the target, at least"
    assert rows[name, f"{authors.THEIRS} / {authors.OURS}"] == pytest.approx((12 + 6) / 2)
