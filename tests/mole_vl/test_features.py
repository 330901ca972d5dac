"""Gates conditioned on what the model itself is told, against the gate's formula row by row."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from mole_vl import mean_weights, merged, mix, mix_from, read_gates, save_gates
from mole_vl.gates import (
    Average,
    Constants,
    Free,
    Hidden,
    MoLE,
    Responses,
    ScaledSoftmax,
    Sigmoid,
    Softmax,
    Sum,
)
from mole_vl.losses import balance
from mole_vl.training import centre_gates
from tests.mole_vl.test_centring import Rows
from tests.mole_vl.test_slots import FILLED, SLOTS, four
from tests.toys import BLOCKS, SITES, Toy, expert, inputs, randomise, three, with_constant_weights

READING_SITES = [site for site in SITES if site != {"site": "network", "after": 1}]


@dataclass(frozen=True)
class Context:
    """What the toy is told beside its input, as features: each row's summed context."""

    name: str = "context"
    width: int = 5
    held: bool = False

    def __call__(self, args, kwargs):
        context = kwargs["context"] if "context" in kwargs else args[1]
        return context.sum(1)


def conditioned(site=SITES[2], gate=None, model=None):
    model = model or Toy()
    gate = gate or MoLE()
    mixture = mix(model, three(model), gate=gate, **site, blocks=BLOCKS, features=Context())
    return model, mixture


def told(mixture, site, context):
    """The part of a gate's logits that its features give, (rows, E)."""
    return context.sum(1) @ mixture.gate(site).conditioning.weight.T


@pytest.mark.parametrize("over", ["row", "position"])
@pytest.mark.parametrize("score", [Hidden(), Responses(), Free()])
def test_logits_are_the_scores_plus_a_linear_map_of_the_features(score, over):
    model = Toy()
    # Without attention's keys: they read another sequence than a gate over positions.
    experts = [
        expert(name, model, ["blocks.0.attention.q", "blocks.0.ff.0"], [1, 2], seed)
        for seed, name in enumerate(["ann", "bob", "cyd"])
    ]
    # One gate, which reads before any expert has spoken.
    mixture = mix(
        model,
        experts,
        gate=MoLE(score=score, over=over),
        site="network",
        blocks=BLOCKS,
        features=Context(),
    )
    randomise(mixture)
    x, context = inputs()
    name = "network"
    with mixture.record() as records:
        model(x, context=context)
    read = model.inlet(x)
    if over == "row":
        read = F.normalize(read, dim=-1).mean(1)
    gate = mixture.gate(name)
    for row in range(3):
        own = gate.score(read[row : row + 1], mixture._answers.bank.readers[name])
        own = own if own.dim() > 1 else own.expand(1, 3)
        expected = own[0] + told(mixture, name, context)[row]
        torch.testing.assert_close(records[0].output.logits[row], expected)
        weights = gate.normaliser(expected)
        torch.testing.assert_close(records[0].output.weights[row], weights)


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("score", [Hidden(), Free()])
@pytest.mark.parametrize(
    ("normaliser", "weight"), [(Softmax(), 1 / 3), (ScaledSoftmax(), 1.0), (Sigmoid(), 1.0)]
)
def test_an_untrained_mixture_is_still_a_plain_merge(site, score, normaliser, weight):
    model = Toy()
    plain = with_constant_weights(
        model, three(model), dict.fromkeys(["ann", "bob", "cyd"], weight), *inputs()
    )
    model, _ = conditioned(site, MoLE(score=score, normaliser=normaliser), model)
    torch.testing.assert_close(model(*inputs()), plain)


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("score", [Hidden(), Free()])
def test_a_row_is_as_it_is_alone(site, score):
    model, mixture = conditioned(site, MoLE(score=score))
    randomise(mixture)
    x, context = inputs()
    together = model(x, context)
    for row in range(3):
        alone = model(x[row : row + 1], context=context[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1])


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("score", [Hidden(), Free()])
def test_a_forward_that_runs_again_reads_what_it_was_told(site, score):
    model, mixture = conditioned(site, MoLE(score=score, normaliser=Sigmoid()))
    randomise(mixture)
    found = []
    for on in (False, True):
        model.checkpointing = on
        first, second, third = (inputs(seed=seed) for seed in (1, 2, 3))
        one, two = model(*first), model(*second)
        with torch.no_grad():
            model(*third)
        loss = one.square().mean() + two.pow(3).mean()
        found.append(torch.autograd.grad(loss, list(mixture.parameters())))
    assert all(grad.abs().sum() > 0 for grad in found[0] if grad.dim() > 0)
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-4)


def test_a_gradient_reaches_what_the_model_was_told():
    model, mixture = conditioned(gate=MoLE(score=Free()))
    randomise(mixture)
    x, context = inputs()
    found = []
    for on in (False, True):
        model.checkpointing = on
        given = context.clone().requires_grad_()
        model(x, given).square().mean().backward()
        found.append(given.grad)
    torch.testing.assert_close(found[0], found[1])
    rows = given.detach().requires_grad_()
    with mixture.record() as records:
        model(x, rows)
    (grad,) = torch.autograd.grad(records[0].output.weights[:, 0].sum(), rows)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("site", READING_SITES, ids=str)
@pytest.mark.parametrize("score", [Hidden(), Free()])
def test_rows_take_features_with_the_result_of_the_row_they_are_told_of(site, score):
    model, mixture = conditioned(site, MoLE(score=score))
    randomise(mixture)
    (x, context), (_, negative) = inputs(), inputs(seed=7)
    with mixture.record() as records:
        positive = model(x, context)
    with mixture.pinned({r.site: r.output.weights for r in records}):
        other = model(x, negative)
    source = torch.tensor([3, 4, 5, 3, 4, 5])
    with mixture.condition(source=source):
        both = model(torch.cat([x, x]), torch.cat([negative, context]))
    torch.testing.assert_close(both, torch.cat([other, positive]))


def test_slots_and_masks_go_together_with_features():
    for score in (Hidden(), Free()):
        model = Toy()
        gate = MoLE(score=score, normaliser=Sigmoid())
        mixture = mix(model, four(model), gate=gate, blocks=BLOCKS, slots=SLOTS, features=Context())
        randomise(mixture)
        x, context = inputs()
        with mixture.condition(filled=FILLED), mixture.record() as records:
            together = model(x, context)
        for row in range(3):
            with mixture.condition(filled=FILLED[row : row + 1]):
                alone = model(x[row : row + 1], context[row : row + 1])
            torch.testing.assert_close(alone, together[row : row + 1])
        if score == Free():
            logits = mixture.gate("blocks.0").score(None, ()) + told(mixture, "blocks.0", context)
            torch.testing.assert_close(records[0].output.logits, logits)
            assert torch.equal(records[0].output.experts, FILLED)
    model, mixture = conditioned(gate=MoLE(score=Free()))
    randomise(mixture)
    with mixture.masked(["bob"]), mixture.record() as records:
        model(x, context)
    logits = records[0].output.logits[:, [0, 2]] / mixture.gate("blocks.0").normaliser.temperature()
    torch.testing.assert_close(records[0].output.weights[:, [0, 2]], logits.softmax(-1))


class Unreadable(Context):
    def __call__(self, args, kwargs):
        raise RuntimeError("these features cannot be read")


def test_features_are_read_only_where_gates_speak():
    model = Toy()
    base = model(*inputs())
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS, features=Unreadable())
    for _ in range(2):  # The first does not leave the mixture locked, or inside a forward.
        with pytest.raises(RuntimeError, match="cannot be read"):
            model(*inputs())
    with mixture.disabled():
        assert torch.equal(model(*inputs()), base)
    with mixture.pinned({"ann": 1.0}):
        expected = model(*inputs())
    mixture.bake({"ann": 1.0})
    torch.testing.assert_close(model(*inputs()), expected)


def test_weights_vary_so_a_merge_takes_their_mean():
    model, mixture = conditioned(gate=MoLE(score=Free()))
    randomise(mixture)
    with mixture.record() as records:
        model(*inputs())
    for constant in (mixture.bake, mixture.constant_weights, lambda: merged(mixture, "one")):
        with pytest.raises(ValueError, match="these gates read context, so their weights vary"):
            constant()
    means = mean_weights(records)
    logits = mixture.gate("blocks.0").score(None, ()) + told(mixture, "blocks.0", inputs()[1])
    weights = mixture.gate("blocks.0").normaliser(logits)
    torch.testing.assert_close(means["blocks.0"], weights.mean(0))
    with mixture.pinned(means):
        expected = model(*inputs())
    mixture.bake(means)
    torch.testing.assert_close(model(*inputs()), expected)
    _, reading = conditioned()
    with pytest.raises(ValueError, match="these gates read their input and context"):
        reading.bake()


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("score", [Hidden(), Free()])
def test_gate_files_name_the_features(tmp_path, site, score):
    model, mixture = conditioned(site, MoLE(score=score))
    randomise(mixture)
    twin = Toy()
    twin.load_state_dict(mixture.base_state_dict())
    path = tmp_path / "gates.safetensors"
    save_gates(mixture, path)
    assert read_gates(path).features == "context"
    experts = three(twin)[::-1]
    again = mix_from(twin, experts, path, blocks=BLOCKS, features=Context())
    assert "features: context" in repr(again)
    assert torch.equal(twin(*inputs()), model(*inputs()))


def test_gate_files_of_other_features_are_refused(tmp_path):
    path, plain = tmp_path / "gates.safetensors", tmp_path / "plain.safetensors"
    _, mixture = conditioned()
    save_gates(mixture, path)
    other = Toy()
    save_gates(mix(other, three(other), gate=MoLE(), blocks=BLOCKS), plain)
    assert read_gates(plain).features is None
    base = Toy()
    before, given = str(base), {"experts": three(base), "blocks": BLOCKS}
    with pytest.raises(ValueError, match="trained with the features 'context', and none are given"):
        mix_from(base, path=path, **given)
    with pytest.raises(ValueError, match="'context', and 'else' is given"):
        mix_from(base, path=path, **given, features=Context("else"))
    with pytest.raises(ValueError, match="with no features, and 'context' is given"):
        mix_from(base, path=plain, **given, features=Context())
    with pytest.raises(ValueError, match=r"conditioning.weight has shape \(3, 5\), expected \(3, "):
        mix_from(base, path=path, **given, features=Context(width=4))
    assert str(base) == before


def test_a_copy_and_a_pickle_are_told_too():
    model, mixture = conditioned()
    randomise(mixture)
    expected = model(*inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*inputs()), expected)


def test_conditioning_leaves_centres_as_they_are():
    plain, told_too = Rows("row"), Rows("row")
    told_too.model.load_state_dict(plain.mixture.base_state_dict(), strict=False)
    told_too.mixture.unmix()
    told_too.mixture = mix(
        told_too.model, three(told_too.model)[:1], gate=MoLE(), blocks=BLOCKS, features=Context()
    )
    for task in (plain, told_too):
        centre_gates([task.mixture], task, rows=2, seed=5)
    for name in plain.mixture.sites:
        one, two = plain.mixture.gate(name), told_too.mixture.gate(name)
        assert one.score.centre.abs().sum() > 0
        assert torch.equal(one.score.centre, two.score.centre)
        assert not two.conditioning.weight.any()


def test_scores_of_features_are_fp32_under_autocast():
    for score in (Hidden(), Free()):
        model, mixture = conditioned({"site": "network"}, MoLE(score=score))
        randomise(mixture)
        x, context = inputs()
        with mixture.record() as plain:
            model(x, context)
        with torch.autocast("cpu", torch.bfloat16), mixture.record() as cast:
            model(x, context)
        tolerance = {"atol": 0.05, "rtol": 0.0} if score == Hidden() else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(cast[0].output.logits, plain[0].output.logits, **tolerance)


def test_balance_moves_the_conditioning():
    model, mixture = conditioned(gate=MoLE(score=Free(), normaliser=Sigmoid()))
    randomise(mixture)
    with mixture.record() as records:
        model(*inputs())
    balance(records).backward()
    assert all(p.grad.abs().sum() > 0 for p in mixture.gates.parameters())


HELD = {"site": "preview", "after": 1}


def held(gate=None):
    model = Toy()
    given = {"gate": gate or MoLE(), **HELD, "blocks": BLOCKS, "features": Context(held=True)}
    mixture = mix(model, three(model), **given)
    randomise(mixture)
    return model, mixture


@pytest.mark.parametrize("shown", ["base", "average"])
def test_what_a_preview_is_told_holds_for_all_forwards(shown):
    model, mixture = held(MoLE(preview=shown))
    twin = copy.deepcopy(model)
    x, context = inputs()
    with mixture.condition(hold=True), mixture.record() as records:
        mixture.preview(x, context)
        model(x, context)
        model(x, context * 0)  # Told otherwise, it takes the weights that were found.
    torch.testing.assert_close(records[1].output.weights, records[0].output.weights)
    with torch.no_grad():
        twin.mixture.gate("network").conditioning.weight.zero_()
    with twin.mixture.condition(hold=True), twin.mixture.record() as plain:
        twin.mixture.preview(x, context)
        twin(x, context)
    logits = plain[0].output.logits + told(mixture, "network", context)
    torch.testing.assert_close(records[0].output.logits, logits)
    records[0].output.weights[:, 0].sum().backward()
    assert mixture.gate("network").conditioning.weight.grad.abs().sum() > 0


def test_what_is_held_is_read_in_the_preview_alone():
    model = Toy()
    given = {"gate": MoLE(), **HELD, "blocks": BLOCKS}
    mixture = mix(model, three(model), **given, features=Unreadable(held=True))
    x, context = inputs()
    with mixture.condition(hold=True), pytest.raises(RuntimeError, match="cannot be read"):
        mixture.preview(x, context)
    with mixture.condition(hold=True), mixture.pinned({"ann": 1.0}):
        mixture.preview(x, context)
        expected = model(x, context)
    mixture.unmix()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    with mixture.pinned({"ann": 1.0}):
        torch.testing.assert_close(model(x, context), expected)


@pytest.mark.parametrize(
    "where",
    [{"site": "block"}, {"site": "network", "after": 1}, {**HELD, "score": Free()}],
    ids=str,
)
def test_what_is_held_wants_a_preview(where):
    model, where = Toy(), dict(where)
    gate = MoLE(score=where.pop("score", Hidden()))
    with pytest.raises(ValueError, match="told once for all forwards of a row, by what site 'prev"):
        mix(model, three(model), gate=gate, **where, blocks=BLOCKS, features=Context(held=True))
    assert not hasattr(model, "mixture")


@pytest.mark.parametrize(
    "gate", [Sum(), Average(), Constants(weights={"ann": 1.0, "bob": 0.0, "cyd": 1.0})]
)
def test_constant_gates_take_none(gate):
    with pytest.raises(ValueError, match=f"the gate {type(gate).__name__} reads none: leave them"):
        conditioned(gate=gate)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="'context' change with every forward, and site 'preview'"):
        conditioned({"site": "preview"})
    model = Toy()
    with pytest.raises(ValueError, match=r"features.width is 0, expected at least 1"):
        mix(model, three(model), gate=MoLE(), blocks=BLOCKS, features=Context(width=0))
    mix(model, three(model), gate=MoLE(), blocks=BLOCKS, features=Context(width=4))
    shapes = r"'context' of a forward are of shape \(3, 5\), expected \(rows, 4\)"
    with pytest.raises(ValueError, match=shapes):
        model(*inputs())
