"""What gates say in training: logged beside the loss, no part of it, and drawn."""

import json
from xml.etree import ElementTree

import pytest
import torch

from mole_vl import mix
from mole_vl.gates import MoLE, Sigmoid
from mole_vl.training import LOG, FitConfig, Gauged, Term, draw_gates, fit
from mole_vl.training.rows import rows_of_step
from tests.toys import BLOCKS, Toy, randomise, three


class Rows:
    """The toy's mean output; rows weigh alike."""

    def __init__(self, slots=None):
        torch.manual_seed(0)
        self.model = Toy()
        gate = MoLE(normaliser=Sigmoid())
        self.mixture = mix(self.model, three(self.model), gate=gate, blocks=BLOCKS, slots=slots)
        randomise(self.mixture)

    def parameters(self):
        return dict(self.mixture.gates.named_parameters())

    def place(self, device):
        self.model.to(device)

    def batch(self, rows):
        return tuple(
            torch.stack([torch.randn(*shape, generator=row.generator(stream)) for row in rows])
            for stream, shape in enumerate([(4, 3), (2, 5)])
        )

    def units(self, batch):
        return len(batch[0])

    def losses(self, batch):
        filled = None if self.mixture.slots is None else torch.tensor([[0, 2]] * len(batch[0]))
        with self.mixture.condition(filled=filled):
            return {"mean": Term(self.model(*batch).square().mean())}


def config(folder, **changes):
    how = {"steps": 3, "rows": 4, "log_every": 1, "lr": 0.05, "progress": False}
    return FitConfig(output=folder, **{**how, **changes})


def log_of(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_the_mean_of_what_each_gate_says_is_logged_for_the_global_batch(tmp_path):
    task = Rows()
    with task.mixture.record() as records, torch.no_grad():
        task.losses(task.batch(rows_of_step(0, 0, 4)))
    expected = {
        f"gates/toy/{record.site}/{name}": record.output.weights.mean(0)[place].item()
        if record.output.weights.dim() > 1
        else record.output.weights[place].item()
        for record in records
        for place, name in enumerate(task.mixture.names)
    }
    fit(Gauged(task, {"toy": task.mixture}), config(tmp_path, micro_rows=2))
    first = log_of(tmp_path)[0]
    assert {key for key in first if key.startswith("gates/")} == set(expected)
    assert {key: first[key] for key in expected} == pytest.approx(expected, abs=1e-5)


def test_measures_change_nothing_of_the_training_and_are_no_terms(tmp_path):
    plain, gauged = Rows(), Rows()
    fit(plain, config(tmp_path / "plain"))
    seen = []
    ended = fit(
        Gauged(gauged, {"toy": gauged.mixture}),
        config(tmp_path / "gauged"),
        watch=lambda progress: seen.append(progress.terms),
    )
    for one, other in zip(plain.parameters().values(), gauged.parameters().values(), strict=True):
        assert torch.equal(one, other)
    assert ended.terms.keys() == {"mean"}
    assert all(terms.keys() == {"mean"} for terms in seen)


def test_gates_over_slots_are_logged_by_slot(tmp_path):
    task = Rows({"who": ["ann", "bob"], "how": ["cyd"]})
    fit(Gauged(task, {"toy": task.mixture}), config(tmp_path, steps=1))
    assert {key.rsplit("/", 1)[1] for key in log_of(tmp_path)[0] if "/" in key} == {"who", "how"}


def test_a_run_is_drawn_with_a_cell_for_each_site_step_and_expert(tmp_path):
    task = Rows()
    mixtures = {"toy": task.mixture}
    fit(Gauged(task, mixtures), config(tmp_path))
    draw_gates(tmp_path / LOG, mixtures, tmp_path)
    tree = ElementTree.fromstring((tmp_path / "toy.svg").read_text())
    told = [title.text for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    last = log_of(tmp_path)[2]
    for site in task.mixture.sites:
        for name in task.mixture.names:
            value = last[f"gates/toy/{site}/{name}"]
            assert f"{name}, {site}, step 3: {value:.2f}" in told
    assert len(told) == 3 * len(task.mixture.sites) * len(task.mixture.names)


def test_a_run_without_measures_is_not_drawn(tmp_path):
    task = Rows()
    fit(task, config(tmp_path))
    draw_gates(tmp_path / LOG, {"toy": task.mixture}, tmp_path)
    assert not (tmp_path / "toy.svg").exists()
