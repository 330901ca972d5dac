"""TIES, DARE and rank-limited sums against plain arithmetic on whole Delta-W."""

from copy import deepcopy

import peft
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mole_vl import Expert, Factors, write_peft
from mole_vl.arithmetic import weighted_sum
from mole_vl.compression import compressed
from mole_vl.magnitude import kth_largest
from mole_vl.sparsified import dare, ties
from tests.mole_vl.drawn import NAMES, drawn, turned
from tests.toys import Toy, three


def deltas(one):
    return {path: own.delta() for path, own in one.layers.items()}


def trimmed(dense, density, over):
    """The largest entries of one expert's updates."""

    def cut(parts):
        sizes = torch.cat([part.abs().flatten() for part in parts]).sort(descending=True).values
        return sizes[max(1, int(density * len(sizes))) - 1]

    if over == "network":
        bound = cut(list(dense.values()))
        return {path: d * (d.abs() >= bound) for path, d in dense.items()}
    return {path: d * (d.abs() >= cut([d])) for path, d in dense.items()}


def elected(parts, weights):
    """Entry by entry, as the paper has it."""
    found = torch.zeros_like(parts[0]).flatten()
    columns = torch.stack([part.flatten() for part in parts], 1).tolist()
    for place, column in enumerate(columns):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [w * x for w, x in zip(weights, column, strict=True) if x * sign > 0]
        if agreeing:
            found[place] = sum(agreeing) / len(agreeing)
    return found.view_as(parts[0])


def close(one, expected, tolerance=1e-4):
    """Whether an expert is these updates; layers without one are left out."""
    real = {path for path, delta in expected.items() if delta.any()}
    assert one.layers.keys() == real
    for path in real:
        torch.testing.assert_close(
            one.layers[path].delta(), expected[path].float(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("over", ["network", "layer"])
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    weights=st.lists(st.sampled_from([0.5, 1.0, -2.0]), min_size=1, max_size=5),
)
def test_ties_is_the_vote_entry_by_entry(over, seed, density, weights):
    experts = drawn(seed, NAMES[: len(weights)])
    found = ties("one", experts, density=density, weights=weights, over=over)
    assert found.expert.name == "one"
    assert found.total < 1e-6
    own = [trimmed(deltas(one), density, over) for one in experts]
    expected = {}
    for path in {path for one in experts for path in one.layers}:
        here = [(parts[path], w) for parts, w in zip(own, weights, strict=True) if path in parts]
        expected[path] = elected(*zip(*here, strict=True))
    close(found.expert, expected)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
        min_size=1,
        max_size=30,
    ),
    part=st.data(),
)
def test_the_kth_largest_is_that_of_all_sorted(values, part):
    k = part.draw(st.integers(1, len(values)))
    at = part.draw(st.integers(0, len(values)))
    parts = [torch.tensor(values[:at]), torch.tensor(values[at:])]
    assert kth_largest(lambda: iter(parts), k) == sorted(map(abs, values), reverse=True)[k - 1]


@pytest.mark.parametrize("kind", ["ties_svd", "magnitude_prune_svd"])
def test_at_full_rank_ties_is_that_of_peft(tmp_path, kind):
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 8), "k": torch.nn.Linear(5, 4)})
    experts = drawn(shapes={"q": (8, 6), "k": (4, 5)}, names=NAMES[:3], full=True)
    for one in experts:
        write_peft(one, tmp_path / one.name)
    peer = peft.PeftModel.from_pretrained(deepcopy(model), tmp_path / "ann", "ann")
    for name in NAMES[1:3]:
        peer.load_adapter(tmp_path / name, adapter_name=name)
    weights = [1.0, 0.5, -2.0]
    peer.add_weighted_adapter(
        list(NAMES[:3]), weights, "all", kind, svd_rank=6, density=0.5, svd_full_matrices=False
    )
    if kind == "ties_svd":
        ours = ties("one", experts, weights=weights, density=0.5, over="layer").expert
    else:  # One expert at a time has nobody to vote against.
        alone = [ties(one.name, [one], density=0.5, over="layer").expert for one in experts]
        ours = weighted_sum("one", alone, weights)
    for path in ("q", "k"):
        theirs = peer.base_model.model[path].get_delta_weight("all")
        torch.testing.assert_close(ours.layers[path].delta(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("elect", [False, True])
def test_dare_keeps_entries_rescaled_and_merges_them(elect):
    experts = drawn()
    weights = [1.0, -0.5, 2.0, 0.25, 1.5]
    # What each keeps, alone: its own entries over the density, or nothing.
    alone = [
        dare(one.name, [one], density=0.4, weights=[1.0], seed=3).expert.layers for one in experts
    ]
    kept = entries = 0
    own = []
    for one, layers in zip(experts, alone, strict=True):
        found = {}
        for path, delta in deltas(one).items():
            left = layers[path].delta() if path in layers else torch.zeros_like(delta)
            mask = left.abs() > delta.abs()
            found[path] = delta * mask / 0.4
            torch.testing.assert_close(left, found[path], rtol=1e-4, atol=1e-4)
            kept, entries = kept + int(mask.sum()), entries + mask.numel()
        own.append(found)
    # Five standard deviations of so many draws.
    assert abs(kept / entries - 0.4) < 5 * (0.4 * 0.6 / entries) ** 0.5
    expected = {}
    for path in {path for one in experts for path in one.layers}:
        here = [(parts[path], w) for parts, w in zip(own, weights, strict=True) if path in parts]
        parts, shares = zip(*here, strict=True)
        expected[path] = (
            elected(parts, shares)
            if elect
            else sum(w * part for part, w in zip(parts, shares, strict=True))
        )
    found = dare("one", experts, density=0.4, weights=weights, elect=elect, seed=3)
    close(found.expert, expected)


def test_dares_draws_are_the_seeds_the_names_and_the_layers():
    experts = drawn()
    first = dare("one", experts, seed=1)
    again = dare("one", experts[::-1], seed=1)
    close(again.expert, deltas(first.expert))
    other = dare("one", experts, seed=2)
    assert any(
        not torch.allclose(own.delta(), other.expert.layers[path].delta())
        for path, own in first.expert.layers.items()
    )
    twin = dare("one", [Expert("zoe", experts[0].layers)], seed=1)
    assert not torch.allclose(
        twin.expert.layers["q"].delta(), dare("one", experts[:1], seed=1).expert.layers["q"].delta()
    )


def test_with_nothing_dropped_dare_is_the_average():
    experts = drawn()
    found = dare("one", experts, density=1.0).expert
    close(found, deltas(weighted_sum("one", experts, [1 / len(experts)] * len(experts))))


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize(
    "merge",
    [
        lambda experts: ties("one", experts, density=0.3),
        lambda experts: ties("one", experts, density=0.3, over="layer", rank=2),
        lambda experts: dare("one", experts, density=0.3, seed=5),
        lambda experts: dare("one", experts, density=0.3, elect=True, rank=2),
        lambda experts: compressed(weighted_sum("one", experts, [1.0, -2.0, 0.5, 1.0, 3.0]), 2),
    ],
    ids=["ties", "ties by layer", "dare", "dare with a vote", "sum"],
)
def test_a_rotation_in_rank_space_changes_nothing(merge, orthogonal):
    experts = drawn()
    before, after = merge(experts), merge(turned(experts, orthogonal))
    close(after.expert, deltas(before.expert))
    assert after.total == pytest.approx(before.total, abs=1e-5)


def test_a_smaller_rank_is_the_best_of_its_rank_and_says_what_it_misses():
    experts = drawn()
    whole = ties("one", experts)
    for small in (ties("one", experts, rank=2), compressed(whole.expert, 2)):
        lost = size = 0.0
        for path, own in whole.expert.layers.items():
            delta = own.delta().flatten(1).double()
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            best = (u[:, :2] * s[:2]) @ vh[:2]
            found = small.expert.layers[path].delta().flatten(1).double()
            torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)
            part = float(s[2:].norm() / s.norm())
            assert small.error[path] == pytest.approx(part, abs=1e-5)
            lost, size = lost + float(s[2:].square().sum()), size + float(s.square().sum())
        assert small.total == pytest.approx((lost / size) ** 0.5, abs=1e-5)


def test_a_sum_is_compressed_to_nothing_less_than_itself():
    model = Toy()
    total = weighted_sum("one", three(model), [0.5, -1.0, 2.0])
    found = compressed(total)
    assert found.total < 1e-6
    close(found.expert, deltas(total))


def test_what_means_nothing_is_refused():
    experts = drawn()
    for merge in (ties, dare):
        for density in (0.0, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"density is .*, expected 0 < density <= 1"):
                merge("one", experts, density=density)
        with pytest.raises(ValueError, match="2 weights for 5 experts"):
            merge("one", experts, weights=[1.0, 1.0])
        with pytest.raises(ValueError, match="the weight of 'bob' is nan"):
            merge("one", experts[:2], weights=[1.0, float("nan")])
        with pytest.raises(ValueError, match="rank is 0, expected at least 1"):
            merge("one", experts, rank=0)
        with pytest.raises(ValueError, match="nothing changes the base"):
            merge("one", experts[:1], weights=[0.0])
        with pytest.raises(ValueError, match="at least one expert"):
            merge("one", [])
    with pytest.raises(ValueError, match="over is 'model', expected one of network, layer"):
        ties("one", experts, over="model")
    with pytest.raises(ValueError, match=r"seed is 0.5, expected a whole number"):
        dare("one", experts, seed=0.5)
    dora = Expert("eve", {"q": Factors(torch.ones(1, 5), torch.ones(7, 1), 1.0, torch.ones(7))})
    for refused in (
        lambda: ties("one", [dora]),
        lambda: dare("one", [dora]),
        lambda: compressed(dora),
        lambda: weighted_sum("one", [dora], [1.0]),
    ):
        with pytest.raises(ValueError, match="'eve' is a DoRA at q"):
            refused()
