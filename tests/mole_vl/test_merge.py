"""A mixture as one ordinary LoRA: exact where the rank allows, else the best there is."""

from copy import deepcopy

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from mole_vl import mean_weights, merged, mix, write_peft
from mole_vl.arithmetic import weighted_sum
from mole_vl.gates import Free, MoLE, Sigmoid, Sum
from tests.mole_vl.test_convolutions import Pictures, two
from tests.toys import BLOCKS, SITES, Toy, expert, inputs, randomise, three

WEIGHTS = {"ann": 0.5, "bob": -1.5, "cyd": 0.25}


def test_at_full_rank_it_is_the_mixture():
    model = Toy()
    mixture = mix(model, three(model), gate=Sum(), blocks=BLOCKS)
    with mixture.pinned(WEIGHTS):
        expected = model(*inputs())
    found = merged(mixture, "one", WEIGHTS)
    assert found.total < 1e-6
    assert all(error < 1e-6 for error in found.error.values())
    mix(mixture.unmix(), [found.expert], gate=Sum(), blocks=BLOCKS)
    torch.testing.assert_close(model(*inputs()), expected)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    weights=st.lists(
        st.floats(-2, 2).map(lambda w: round(w, 3)).filter(bool), min_size=3, max_size=3
    )
)
def test_the_exact_merge_is_that_of_peft_which_puts_factors_side_by_side(tmp_path, weights):
    model = Toy()
    experts = three(model)
    names = [one.name for one in experts]
    for one in experts:
        write_peft(one, tmp_path / one.name)
    peer = peft.PeftModel.from_pretrained(deepcopy(model), tmp_path / names[0], names[0])
    for name in names[1:]:
        peer.load_adapter(tmp_path / name, adapter_name=name)
    peer.add_weighted_adapter(names, weights, "all", combination_type="cat")
    peer.set_adapter("all")
    expected = peer(*inputs())
    mixture = mix(model, experts, gate=Sum(), blocks=BLOCKS)
    with mixture.pinned(weights):
        torch.testing.assert_close(model(*inputs()), expected)
    ours = merged(mixture, "one", dict(zip(names, weights, strict=True))).expert
    for one in (ours, weighted_sum("one", experts, weights)):
        mix(model.mixture.unmix(), [one], gate=Sum(), blocks=BLOCKS)
        torch.testing.assert_close(model(*inputs()), expected)


def test_convolutions_too():
    model = Pictures()
    x = torch.randn(2, 3, 8, 7)
    mixture = mix(model, two(model), gate=Sum(), site="matrix")
    with mixture.pinned([0.5, -2.0]):
        expected = model(x)
    found = merged(mixture, "one", torch.tensor([0.5, -2.0]))
    mix(mixture.unmix(), [found.expert], gate=Sum(), site="matrix")
    torch.testing.assert_close(model(x), expected)


def test_a_smaller_rank_is_the_best_of_its_rank_and_says_what_it_misses():
    model = Toy()
    mixture = mix(model, three(model), gate=Sum(), blocks=BLOCKS)
    found = merged(mixture, "one", WEIGHTS, rank=2)
    lost, whole = 0.0, 0.0
    constant = mixture.constant_weights(WEIGHTS)
    for path, factors in found.expert.layers.items():
        full = mixture.layers[path].delta(constant[path])
        u, s, v = torch.linalg.svd(full, full_matrices=False)
        assert factors.rank == min(2, mixture.layers[path].a.shape[0], *full.shape)
        best = (u[:, : factors.rank] * s[: factors.rank]) @ v[: factors.rank]
        torch.testing.assert_close(factors.delta(), best)
        missing = (full - factors.delta()).square().sum()
        assert found.error[path] == pytest.approx(
            float((missing / full.square().sum()).sqrt()), abs=1e-5
        )
        lost, whole = lost + float(missing), whole + float(full.square().sum())
    assert found.total == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert found.total > 0.01


@pytest.mark.parametrize("site", SITES, ids=str)
def test_gates_that_read_nothing_are_merged_as_they_stand(site):
    model = Toy()
    gate = MoLE(score=Free(), normaliser=Sigmoid())
    mixture = mix(model, three(model), gate=gate, **site, blocks=BLOCKS)
    randomise(mixture)
    expected = model(*inputs())
    found = merged(mixture, "one")
    mix(mixture.unmix(), [found.expert], gate=Sum(), blocks=BLOCKS)
    torch.testing.assert_close(model(*inputs()), expected)


@pytest.mark.parametrize("over", ["row", "position"])
def test_mean_weights_are_the_mean_over_what_is_real(over):
    model = Toy()
    paths = ["blocks.0.attention.q", "blocks.1.ff.0"]
    made = [expert(name, model, paths, [1, 2], seed=len(name)) for name in ("a", "bb")]
    mixture = mix(model, made, gate=MoLE(over=over), site="network", blocks=BLOCKS)
    randomise(mixture)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    with mixture.condition(real=real), mixture.record() as records:
        model(*inputs(seed=1))
        model(*inputs(seed=2))
    seen = [record.output.weights for record in records]
    if over == "position":
        seen = [weights[real] for weights in seen]
    found = mean_weights(records)
    torch.testing.assert_close(found["network"], torch.cat(seen).mean(0))
    merged(mixture, "one", found)


def test_mean_weights_count_the_strength_that_was_applied():
    model = Toy()
    mixture = mix(model, three(model), gate=Sum(), site="network", blocks=BLOCKS)
    with mixture.record() as records:
        with mixture.scaled(0.5):
            model(*inputs())
        with mixture.scaled(torch.tensor(0.25)):
            model(*inputs())
    torch.testing.assert_close(mean_weights(records)["network"], torch.full((3,), 0.375))


def test_what_cannot_be_merged_is_said():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    with pytest.raises(ValueError, match="these gates read their input"):
        merged(mixture, "one")
    with pytest.raises(ValueError, match="rank is 0"):
        merged(mixture, "one", WEIGHTS, rank=0)
    with pytest.raises(ValueError, match="nothing changes the base"):
        merged(mixture, "one", {"ann": 0.0})
    with pytest.raises(ValueError, match="no gate result was recorded"):
        mean_weights([])
