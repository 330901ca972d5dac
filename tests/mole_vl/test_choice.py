"""A gate taught by what each expert alone makes of each example; and the highest scores alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from mole_vl import mix
from mole_vl.domain import gate_parameters
from mole_vl.gates import GateInput, Hidden, MoLE, ScaledSoftmax, Sigmoid, Softmax
from mole_vl.training import FitConfig, Row, Term, choice_task, fit
from tests.mole_vl.test_features import Context
from tests.toys import BLOCKS, Toy, inputs, randomise, three

NORMALISERS = (Softmax(), ScaledSoftmax(total=2.0), Sigmoid())
ROWS = 12


class Examples:
    """Rows that one expert answered; which of them is hidden in the rows themselves."""

    def __init__(self, gate=MoLE(), **how):  # noqa: B008 (frozen)
        torch.manual_seed(0)
        self.model = Toy()
        how = {"site": "preview", "after": 1, "blocks": BLOCKS, **how}
        self.mixture = mix(self.model, three(self.model), gate=gate, **how)
        self.x, self.context = inputs(rows=ROWS)
        self.own = [i % 3 for i in range(ROWS)]
        for row, own in enumerate(self.own):
            self.x[row, :, own] += 4.0
        with torch.no_grad():
            self.wanted = torch.stack([self.alone(own)[i] for i, own in enumerate(self.own)])

    def alone(self, expert):
        with self.mixture.pinned({self.mixture.names[expert]: 1.0}):
            return self.model(self.x, self.context)

    def parameters(self):
        return gate_parameters({"model": self.mixture})

    def place(self, device):
        self.model.to(device)

    def batch(self, rows):
        return self.examples([row.pick(ROWS) for row in rows])

    def units(self, batch):
        return len(batch)

    def losses(self, batch):
        return {"own": Term(-self.likelihoods(batch).mean())}

    def sizes(self):
        return [i * 5 % ROWS for i in range(ROWS)]

    def examples(self, places):
        return torch.tensor(places)

    def likelihoods(self, batch):
        x, context = self.x[batch], self.context[batch]
        with self.mixture.condition(hold=True):
            self.mixture.preview(x, context)
            found = self.model(x, context)
        return -(found - self.wanted[batch]).square().mean((1, 2))


def conditioned(gate=None):
    task = Examples(gate or MoLE(), features=Context(held=True))
    randomise(task.mixture)
    return task


def test_a_gate_is_taught_what_it_is_told_beside_the_states(tmp_path):
    task = conditioned()
    choice = chosen(task, tmp_path)
    torch.testing.assert_close(choice.survey.features, task.context.sum(1))
    rows = [Row(0, 0, index, 7) for index in range(7)]
    places = [row.pick(ROWS) for row in rows]
    with task.mixture.condition(hold=True), task.mixture.record() as records:
        task.mixture.preview(task.x[places], task.context[places])
        task.model(task.x[places], task.context[places])
    weights = records[0].output.weights
    expected = 1 - (weights * choice.survey.told[places].exp()).sum(-1).mean()
    found = choice.losses(choice.batch(rows))["choice"].value
    torch.testing.assert_close(found, expected)
    own = task.mixture.gate("network").conditioning.weight
    one, other = (torch.autograd.grad(loss, own)[0] for loss in (found, expected))
    torch.testing.assert_close(one, other)
    assert torch.equal(chosen(conditioned(), tmp_path).survey.features, choice.survey.features)
    with pytest.raises(ValueError, match=r"other settings \(features was 'context', is None\)"):
        chosen(Examples(), tmp_path)


def test_a_gate_may_learn_from_what_it_is_told_alone(tmp_path):
    task = conditioned(MoLE(top_k=1))
    # The states of all rows are one.
    task.x[:] = task.x[:1]
    for row, own in enumerate(task.own):
        task.context[row, :, own] += 4.0
    with torch.no_grad():
        task.wanted = torch.stack([task.alone(own)[i] for i, own in enumerate(task.own)])
    config = FitConfig(output=tmp_path, steps=200, rows=6, lr=0.05, progress=False)
    fit(chosen(task, tmp_path), config)
    with task.mixture.condition(hold=True), torch.no_grad():
        task.mixture.preview(task.x, task.context)
        torch.testing.assert_close(task.model(task.x, task.context), task.wanted)


def chosen(task, folder, **how):
    how = {"rows": 5, "settings": {"of": "toys"}, **how}
    return choice_task({"model": task.mixture}, task, folder, **how)


@pytest.mark.parametrize("pool", [("mean",), ("last", "max")])
def test_the_loss_is_what_a_drawn_expert_is_expected_to_miss(tmp_path, pool):
    gate = MoLE(score=Hidden(pool=pool))
    task = Examples(gate)
    randomise(task.mixture)
    choice = chosen(task, tmp_path)
    rows = [Row(0, 0, index, 7) for index in range(7)]
    terms = choice.losses(choice.batch(rows))
    losses, weights = [], []
    for row in rows:
        place = row.pick(ROWS)
        x, context = task.x[[place]], task.context[[place]]
        with task.mixture.condition(hold=True), task.mixture.record() as records:
            task.mixture.preview(x, context)
            task.model(x, context)
        weights.append(records[0].output.weights[0])
        told = torch.stack(
            [-(task.alone(e)[place] - task.wanted[place]).square().mean() for e in range(3)]
        )
        losses.append(1 - (weights[-1] * told.exp()).sum())
    torch.testing.assert_close(terms["choice"].value, torch.stack(losses).mean())
    said = [terms[f"gates/model/network/{name}"].value for name in task.mixture.names]
    torch.testing.assert_close(torch.stack(said), torch.stack(weights).mean(0))


def test_a_gate_learns_whose_rows_are_whose(tmp_path):
    task = Examples(MoLE(top_k=1))
    config = FitConfig(output=tmp_path, steps=120, rows=6, lr=0.05, progress=False)
    fit(chosen(task, tmp_path), config)
    with task.mixture.condition(hold=True), task.mixture.record() as records, torch.no_grad():
        task.mixture.preview(task.x, task.context)
        found = task.model(task.x, task.context)
    weights = records[0].output.weights
    assert weights.argmax(-1).tolist() == task.own
    assert sorted(weights.unique().tolist()) == [0.0, 1.0]
    torch.testing.assert_close(found, task.wanted)


def test_the_survey_is_made_once_whatever_the_batches(tmp_path):
    one = chosen(Examples(), tmp_path / "one").survey
    other = chosen(Examples(), tmp_path / "other", rows=12).survey
    torch.testing.assert_close(other.told, one.told)
    torch.testing.assert_close(other.read, one.read)
    task = Examples()
    task.likelihoods = None
    again = chosen(task, tmp_path / "one").survey
    assert torch.equal(again.told, one.told)
    assert torch.equal(again.read, one.read)
    with pytest.raises(ValueError, match=r"other settings \(of was 'toys', is 'others'\)"):
        chosen(Examples(), tmp_path / "one", settings={"of": "others"})
    with pytest.raises(ValueError, match=r"\(after was 1, is 0\)"):
        chosen(Examples(after=0), tmp_path / "one")
    file = tmp_path / "one/survey.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"survey\.safetensors is damaged or no survey"):
        chosen(Examples(), tmp_path / "one")


def test_likelihoods_that_are_no_numbers_are_told_by_expert_and_not_kept(tmp_path):
    task = Examples()
    with torch.no_grad():
        task.mixture.layers["blocks.1.attention.q"].b.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"(ann|bob|cyd) gives 12 of 12 examples a likelihood"):
        chosen(task, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_that_no_expert_knows_teach_nothing(tmp_path):
    choice = chosen(Examples(), tmp_path)
    choice.survey = replace(choice.survey, told=torch.full((ROWS, 3), -1e4))
    choice.survey.told[:, 0] = -200.0
    loss = choice.losses(choice.batch([Row(0, 0, index, 4) for index in range(4)]))["choice"].value
    assert loss.item() == 1.0
    loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in choice.parameters().values())


def test_what_experts_alone_cannot_teach_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"2 gates \(blocks.0, blocks.1 \.\.\.\), expected one"):
        chosen(Examples(site="block", after=0), tmp_path)
    with pytest.raises(ValueError, match="MoLE over rows with Hidden scores"):
        chosen(Examples(MoLE(over="position"), site="network", after=0), tmp_path)
    for normaliser in (ScaledSoftmax(), Sigmoid()):
        with pytest.raises(ValueError, match=r"expected Softmax\(\): experts alone do not teach"):
            chosen(Examples(MoLE(normaliser=normaliser)), tmp_path)
    task = Examples()
    with pytest.raises(ValueError, match="unet, text have gates each"):
        choice_task(
            {"unet": task.mixture, "text": task.mixture}, task, tmp_path, rows=2, settings={}
        )
    with pytest.raises(ValueError, match="a str cannot ask its examples one by one"):
        choice_task({"model": task.mixture}, "no task", tmp_path, rows=2, settings={})
    with pytest.raises(ValueError, match="'context' change with every forward, and an example is"):
        chosen(Examples(site="network", after=0, features=Context()), tmp_path)
    assert not list(tmp_path.iterdir())


SCORES = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=4, max_size=4)


@given(SCORES, st.integers(1, 5), st.sets(st.integers(0, 3), min_size=1))
def test_the_highest_scores_alone_get_weights(scores, k, kept):
    mask = torch.tensor([index in kept for index in range(4)])
    best = sorted(kept, key=lambda index: (-scores[index], index))[:k]
    for normaliser, masked in itertools.product(NORMALISERS, (True, False)):
        gate = MoLE(normaliser=normaliser, top_k=k).build(list("abcd"), SITE, ())
        gate.score.bias.data = torch.tensor(scores)
        own = best if masked else sorted(range(4), key=lambda i: (-scores[i], i))[:k]
        output = gate(GateInput(torch.ones(1, 6), kept=mask if masked else None), ())
        alone = torch.tensor([index in own for index in range(4)])
        whole = gate.normaliser(torch.tensor(scores), alone)
        if isinstance(normaliser, ScaledSoftmax):
            # Its total is shared by the k; a mask takes its part away, as it does without k.
            whole = whole / whole.sum() * 2.0 * (mask.float().mean() if masked else 1.0)
        torch.testing.assert_close(output.weights[0], whole)
        assert output.logits[0].tolist() == scores


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("k", [1, 2])
def test_the_chosen_learn_as_if_there_were_no_others(normaliser, k):
    scores = torch.tensor([0.3, -0.2, 1.0])
    gate = MoLE(normaliser=normaliser, top_k=k).build(list("abc"), SITE, ())
    gate.score.bias.data = scores.clone()
    aim = torch.tensor([1.0, 2.0, 4.0])
    (gate(GateInput(torch.ones(1, 6)), ()).weights * aim).sum().backward()
    best = scores.argsort(descending=True)[:k]
    alone = MoLE(normaliser=normaliser).build(list("ab")[:k], SITE, ())
    if isinstance(normaliser, ScaledSoftmax):
        alone.normaliser.total = gate.normaliser.total
    alone.score.bias.data = scores[best].clone()
    (alone(GateInput(torch.ones(1, 6)), ()).weights * aim[best]).sum().backward()
    expected = torch.zeros(3)
    expected[best] = alone.score.bias.grad
    torch.testing.assert_close(gate.score.bias.grad, expected)
    if not isinstance(normaliser, Sigmoid):
        found, wanted = gate.normaliser.temperature, alone.normaliser.temperature
        torch.testing.assert_close(found.position.grad, wanted.position.grad)


def test_gates_before_the_one_that_reads_leave_nobody_out():
    task = Examples(MoLE(top_k=1), site="network", after=1)
    with task.mixture.record() as records:
        task.model(task.x, task.context)
    below = next(record for record in records if record.site == "below")
    torch.testing.assert_close(below.output.weights, torch.full((3,), 1 / 3))


SITE = next(iter(Examples(site="network", after=0).mixture.sites.values()))
