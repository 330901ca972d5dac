"""Sums of experts against sums of their whole Delta-W."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mole_vl import Expert, Factors
from mole_vl.arithmetic import weighted_sum, without_general
from tests.mole_vl.test_convolutions import Pictures, two
from tests.toys import Toy, three

WEIGHT = st.floats(-3, 3, allow_nan=False).map(lambda w: round(w, 3))


def deltas(experts, weights):
    found = {}
    for one, weight in zip(experts, weights, strict=True):
        for path, factors in one.layers.items() if weight else ():
            found[path] = found.get(path, 0) + weight * factors.delta()
    return found


@settings(deadline=None, max_examples=25)
@given(st.lists(WEIGHT, min_size=3, max_size=3).filter(any))
def test_the_sum_is_that_of_the_updates(weights):
    experts = three(Toy())
    one = weighted_sum("one", experts, weights)
    expected = deltas(experts, weights)
    assert one.layers.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(one.layers[path].delta(), delta)


def test_convolutions_add_up_too():
    experts = two(Pictures())
    one = weighted_sum("one", experts, [2.0, -0.5])
    for path, delta in deltas(experts, [2.0, -0.5]).items():
        torch.testing.assert_close(one.layers[path].delta(), delta)


def test_what_is_general_is_taken_from_each():
    *tasks, general = three(Toy())
    both = [general, tasks[0]]
    for before, after in zip(tasks, without_general(tasks, both), strict=True):
        assert after.name == before.name
        expected = deltas([before, *both], [1.0, -0.5, -0.5])
        for path, delta in expected.items():
            torch.testing.assert_close(after.layers[path].delta(), delta)
    unchanged = without_general(tasks, [])
    assert [one.digest for one in unchanged] == [one.digest for one in tasks]


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([1.0, 1.0], "2 weights for 3 experts"),
        ([0.0, 0.0, 0.0], "nothing changes the base"),
        ([1.0, float("nan"), 1.0], "the weight of 'bob' is nan, expected a finite number"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, told):
    with pytest.raises(ValueError, match=told):
        weighted_sum("one", three(Toy()), weights)


def test_experts_of_different_models_are_refused():
    mine = Expert("mine", {"q": Factors(torch.randn(2, 4), torch.randn(4, 2), 1.0)})
    other = Expert("other", {"q": Factors(torch.randn(2, 6), torch.randn(4, 2), 1.0)})
    told = r"at q, expert 'other' has an update of shape \(4, 6\), expected \(4, 4\)"
    with pytest.raises(ValueError, match=told):
        weighted_sum("one", [mine, other], [1.0, 1.0])
