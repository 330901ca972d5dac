"""Constant weights by search: what is tried, what is kept, and what it costs to stop."""

import json
from pathlib import Path

import nevergrad as ng
import pytest
import torch

from mole_vl import mix, mix_from, save_gates
from mole_vl.gates import LoRAHub, MoLE, Sum
from mole_vl.training import Term
from mole_vl.training.search import SearchConfig, search
from tests.toys import BLOCKS, Toy, inputs, three, with_constant_weights

WANTED = {"ann": 0.5, "bob": -1.0, "cyd": 0.25}


class Wanted:
    """A task whose best answer is that of known weights; it counts how often it is asked."""

    def __init__(self, stop_at: int | None = None, gate=None, site: str = "network") -> None:
        torch.manual_seed(1)
        self.model = Toy()
        experts = three(self.model)
        self.plain = Toy()
        self.plain.load_state_dict(self.model.state_dict())
        self.target = with_constant_weights(self.plain, experts, WANTED, *inputs())
        self.mixture = mix(self.model, experts, gate=gate or LoRAHub(), site=site, blocks=BLOCKS)
        self.stop_at, self.asked = stop_at, 0

    def parameters(self):
        return {}

    def place(self, device):
        self.model.to(device)

    def batch(self, rows):
        return [row.index for row in rows]

    def units(self, batch):
        return sum(1 + index for index in batch)

    def losses(self, batch):
        if self.asked == self.stop_at:
            raise KeyboardInterrupt
        self.asked += 1
        x, context = inputs()
        y = self.model(x[batch], context[batch])
        weights = torch.tensor([1.0 + index for index in batch])
        error = (y - self.target[batch]).square().mean((1, 2))
        return {
            "fit": Term((error * weights).sum() / weights.sum(), 2.0),
            "told": Term(torch.tensor(7.0), weight=0.0),
        }


def config(folder: Path, **changes) -> SearchConfig:
    settings = {"output": folder, "evaluations": 30, "rows": 3, "progress": False}
    return SearchConfig(**{**settings, **changes})


def run(task, folder, **changes):
    return search(task, {"toy": task.mixture}, config(folder, **changes), {"lesson": "toy"})


@torch.no_grad()
def test_a_trial_is_the_loss_of_its_weights(tmp_path):
    task = Wanted()
    found = run(task, tmp_path, l1=0.1)
    for trial in found.trials[:8]:
        weights = dict(zip(task.mixture.names, trial.weights, strict=True))
        y = with_constant_weights(task.plain, three(task.plain), weights, *inputs())
        error = (y - task.target).square().mean((1, 2))
        expected = 2 * float((error * torch.tensor([1.0, 2.0, 3.0])).sum() / 6)
        assert trial.loss == pytest.approx(expected, rel=1e-4)
        size = sum(map(abs, trial.weights)) / 3
        assert trial.objective(0.1) == pytest.approx(expected + 0.1 * size, rel=1e-4)
    assert found.trials[0].weights == (0.0, 0.0, 0.0)
    assert all(-1.5 <= weight <= 1.5 for trial in found.trials for weight in trial.weights)


@torch.no_grad()
def test_it_finds_known_weights_and_leaves_them_in_the_gates(tmp_path):
    task = Wanted()
    found = run(task, tmp_path, evaluations=80, l1=0.0)
    assert found.best.loss < 0.01 * found.trials[0].loss
    assert found.best.loss == min(trial.loss for trial in found.trials)
    y = task.model(*inputs())
    with task.mixture.pinned(found.weights["toy"]["network"]):
        torch.testing.assert_close(task.model(*inputs()), y)
    save_gates(task.mixture, tmp_path / "gates.safetensors")
    experts = three(task.plain)
    mix_from(task.plain, experts, tmp_path / "gates.safetensors", blocks=BLOCKS)
    torch.testing.assert_close(task.plain(*inputs()), y, rtol=0, atol=0)


def test_a_block_may_have_weights_of_its_own(tmp_path):
    task = Wanted(site="block")
    found = run(task, tmp_path, evaluations=5)
    assert len(found.best.weights) == 2 * 3
    assert found.weights["toy"].keys() == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("stop_at", [1, 17])
def test_stopped_it_goes_on_and_tries_nothing_twice(tmp_path, stop_at):
    whole = run(Wanted(), tmp_path / "whole", evaluations=40)
    with pytest.raises(KeyboardInterrupt):
        run(Wanted(stop_at=stop_at), tmp_path / "part", evaluations=40)
    rest = Wanted()
    found = run(rest, tmp_path / "part", evaluations=40)
    assert found == whole
    assert rest.asked == len({trial.weights for trial in whole.trials}) - stop_at


def test_pieces_are_the_whole(tmp_path):
    whole = run(Wanted(), tmp_path / "whole", evaluations=6)
    pieces = run(Wanted(), tmp_path / "pieces", evaluations=6, micro_rows=1)
    assert [t.loss for t in pieces.trials] == pytest.approx(
        [t.loss for t in whole.trials], rel=1e-5
    )


def test_weights_whose_loss_is_no_number_are_the_worst(tmp_path):
    task = Wanted()
    losses = task.losses

    def broken(batch):
        nothing = not any(task.mixture.gate("network").values.tolist())
        return losses(batch) if nothing else {"fit": Term(torch.tensor(float("nan")))}

    task.losses = broken
    found = run(task, tmp_path, evaluations=5)
    assert found.best.weights == (0.0, 0.0, 0.0)
    assert json.loads((tmp_path / "evaluations.json").read_text())["trials"][1]["loss"] is None
    task.losses = lambda batch: {"fit": Term(torch.tensor(float("inf")))}
    with pytest.raises(FloatingPointError, match="none of 5 trials had a finite loss"):
        run(task, tmp_path / "none", evaluations=5)


def test_an_optimiser_that_breaks_down_is_named(tmp_path, monkeypatch):
    def ask(_self):
        raise TypeError("only 0-dimensional arrays")

    monkeypatch.setattr(type(ng.optimizers.registry["CMA"](2, budget=2)), "ask", ask)
    with pytest.raises(RuntimeError, match=r"nevergrad's CMA broke down after 0 trials of 30"):
        run(Wanted(), tmp_path, optimizer="CMA")


def test_another_search_is_not_taken_up(tmp_path):
    run(Wanted(), tmp_path, evaluations=3)
    with pytest.raises(ValueError, match=r"tried with other settings \(l1 was 0.05, is 0.1\)"):
        run(Wanted(), tmp_path, evaluations=3, l1=0.1)


def test_gates_that_are_not_constant_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"search: the gates are MoLE\(.*\), expected LoRAHub"):
        run(Wanted(gate=MoLE()), tmp_path)
    assert not tmp_path.joinpath("evaluations.json").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"evaluations": 0}, "evaluations is 0"),
        ({"low": 0.5}, r"low and high are 0.5 and 1.5, expected low <= 0 <= high"),
        ({"low": -float("inf")}, "both finite"),
        ({"l1": float("inf")}, "l1 is inf"),
        ({"seed": 2**32}, "seed is 4294967296, expected 0 to 4294967295"),
        ({"optimizer": "Best"}, "optimizer is 'Best', expected one that nevergrad registers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        config(tmp_path, **changes)


def test_a_cast_model_keeps_the_weights_found(tmp_path):
    task = Wanted()
    found = run(task, tmp_path, evaluations=5)
    task.model.to(torch.bfloat16)
    kept = task.mixture.gate("network").values
    assert kept.tolist() == pytest.approx(found.best.weights)
    assert kept.dtype == torch.float32
    # A sum stays a sum.
    model = Toy()
    mixture = mix(model, three(model), gate=Sum(), site="network", blocks=BLOCKS)
    model.to(torch.bfloat16)
    assert mixture.gate("network").values.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {}, "trials": [1]}'])
def test_damaged_trials_are_named(tmp_path, content):
    (tmp_path / "evaluations.json").write_text(content)
    with pytest.raises(ValueError, match=r"evaluations.json (is no|holds a list)"):
        run(Wanted(), tmp_path, evaluations=3)
