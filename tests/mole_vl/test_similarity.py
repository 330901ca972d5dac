"""Similarities, norms, embeddings and prototypes against whole Delta-W, flattened."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from mole_vl import Expert, Factors, mix
from mole_vl.arithmetic import weighted_sum
from mole_vl.embedding import svd_embedding
from mole_vl.experts import check_names
from mole_vl.gates import Arrow, take_directions
from mole_vl.norms import update_norms
from mole_vl.prototypes import prototypes_of
from mole_vl.similarity import gram, grams_by_layer, similarity
from mole_vl.updates import on_common_layers
from tests.mole_vl.drawn import NAMES, drawn, flat, turned
from tests.toys import Toy, inputs, three

EXACT = {"rtol": 1e-10, "atol": 1e-10}
TURNS = pytest.mark.parametrize("orthogonal", [True, False])


def expert(name, **layers):
    return Expert(name, {p: Factors(a, b, 1.0) for p, (a, b) in layers.items()})


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5))
def test_products_and_cosines_are_those_of_the_flattened_updates(seed, count):
    experts = drawn(seed, NAMES[:count])
    rows = flat(experts)
    torch.testing.assert_close(gram(experts), rows @ rows.T, **EXACT)
    unit = F.normalize(rows, dim=1)
    torch.testing.assert_close(similarity(experts), unit @ unit.T, **EXACT)
    for path, found in grams_by_layer(experts).items():
        own = flat(experts, [path])
        torch.testing.assert_close(found, own @ own.T, **EXACT)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_norms_are_those_of_the_updates(seed):
    experts = drawn(seed)
    found = update_norms(experts)
    torch.testing.assert_close(found.total, flat(experts).norm(dim=1), **EXACT)
    for path, norms in found.by_layer.items():
        torch.testing.assert_close(norms, flat(experts, [path]).norm(dim=1), **EXACT)
    torch.testing.assert_close(found.relative * found.total.mean(), found.total)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5))
def test_the_embedding_is_the_svd_of_the_stacked_updates(seed, count):
    experts = drawn(seed, NAMES[:count])
    rows = flat(experts)
    found = svd_embedding(experts, None)
    _u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(found.spectrum[: len(s)], s, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.vectors @ found.vectors.T, rows @ rows.T, rtol=1e-6, atol=1e-6)
    expected = (rows @ vh.T)[:, : found.vectors.shape[1]]
    torch.testing.assert_close(found.vectors.abs(), expected.abs(), rtol=1e-5, atol=1e-5)
    assert found.held == pytest.approx(1.0)


def test_fewer_dimensions_are_the_best_of_their_number_and_say_what_they_hold():
    experts = drawn()
    rows = flat(experts)
    found = svd_embedding(experts, 2)
    _u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(found.vectors.abs(), (rows @ vh[:2].T).abs())
    assert found.held == pytest.approx(float(s[:2].square().sum() / s.square().sum()))
    largest = found.vectors.gather(0, found.vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_experts_that_are_copies_span_one_dimension():
    one = drawn(names=("ann",))[0]
    twin = Expert("bob", one.layers)
    found = svd_embedding([one, twin])
    assert found.vectors.shape == (2, 1)
    torch.testing.assert_close(found.vectors[0], found.vectors[1])


@TURNS
def test_a_rotation_in_rank_space_changes_nothing(orthogonal):
    experts = drawn()
    other = turned(experts, orthogonal)
    torch.testing.assert_close(similarity(other), similarity(experts), **EXACT)
    torch.testing.assert_close(gram(other), gram(experts), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(svd_embedding(other).vectors, svd_embedding(experts).vectors)
    before, after = update_norms(experts), update_norms(other)
    for path, norms in before.by_layer.items():
        torch.testing.assert_close(after.by_layer[path], norms)
    for one, two in zip(experts, other, strict=True):
        ours, theirs = prototypes_of(one), prototypes_of(two)
        assert ours.keys() == theirs.keys()
        for path, direction in ours.items():
            assert abs(float(direction @ theirs[path])) == pytest.approx(1.0, abs=1e-6)


def test_prototypes_are_the_top_right_singular_vectors():
    for one in drawn():
        found = prototypes_of(one)
        assert found.keys() == one.layers.keys() - {"conv"}
        for path, direction in found.items():
            delta = one.layers[path].delta().double()
            _u, _s, vh = torch.linalg.svd(delta)
            assert abs(float(direction.double() @ vh[0])) == pytest.approx(1.0, abs=1e-5)


def test_nothing_has_no_prototype():
    # Neither factor is zero, and their product is.
    apart = (torch.ones(2, 4), torch.tensor([[1.0, -1.0]]))
    one = expert("ann", q=(torch.randn(2, 4), torch.zeros(3, 2)), k=apart)
    nil = Factors(torch.randn(2, 4), torch.randn(3, 2), 0.0)
    assert list(prototypes_of(Expert("ann", {**one.layers, "v": nil}))) == []


@torch.no_grad()
def test_arrow_with_kept_prototypes_is_arrow():
    model = Toy()
    experts = three(model)
    mixture = mix(model, experts, gate=Arrow(top_k=2), site="matrix")
    expected = model(*inputs())
    gates = {site: mixture.gate(site) for site in mixture.sites}
    for gate in gates.values():
        gate.prototypes.zero_()
    assert not torch.allclose(model(*inputs()), expected)
    take_directions(gates, mixture.names, {one.name: prototypes_of(one) for one in experts})
    torch.testing.assert_close(model(*inputs()), expected)


def test_on_common_layers_the_others_do_not_count():
    experts = drawn()
    common = set.intersection(*(set(one.layers) for one in experts))
    assert common
    assert common < set(experts[0].layers)
    rows = F.normalize(flat(experts, sorted(common)), dim=1)
    torch.testing.assert_close(similarity(on_common_layers(experts)), rows @ rows.T, **EXACT)
    apart = [
        expert(name, **{name: (torch.ones(1, 2), torch.ones(2, 1))}) for name in ("ann", "bob")
    ]
    with pytest.raises(ValueError, match="no layer is changed by all of ann, bob"):
        on_common_layers(apart)


def test_a_convolution_of_single_pixels_is_a_linear_layer():
    a, b = torch.randn(2, 4), torch.randn(3, 2)
    plain = expert("ann", q=(a, b))
    other = expert("bob", q=(a[..., None, None], 2 * b))
    torch.testing.assert_close(similarity([plain, other]), torch.ones(2, 2, dtype=torch.float64))


def summed(experts):
    check_names(experts)
    return weighted_sum("sum", experts, [1.0] * len(experts))


@pytest.mark.parametrize("find", [gram, similarity, update_norms, svd_embedding, summed])
def test_experts_that_cannot_be_compared_are_refused(find):
    q = (torch.randn(2, 4), torch.randn(3, 2))
    ann, wide = expert("ann", q=q), expert("bob", q=(torch.randn(2, 5), torch.randn(3, 2)))
    told = r"at q, expert 'bob' has an update of shape \(3, 5\), expected \(3, 4\), as 'ann' has it"
    with pytest.raises(ValueError, match=told):
        find([ann, wide])
    with pytest.raises(ValueError, match="experts share the names ann"):
        find([ann, ann])
    with pytest.raises(ValueError, match="at least one expert"):
        find([])
    dora = Expert("eve", {"q": Factors(*q, 1.0, torch.ones(3))})
    with pytest.raises(ValueError, match="expert 'eve' is a DoRA at q"):
        find([ann, dora])


def test_an_update_of_nothing_has_no_direction():
    nil = expert("nil", q=(torch.randn(2, 4), torch.zeros(3, 2)))
    ann = expert("ann", q=(torch.randn(2, 4), torch.randn(3, 2)))
    with pytest.raises(ValueError, match="the update of nil is zero"):
        similarity([ann, nil])
    assert update_norms([ann, nil]).total[1] == 0
    with pytest.raises(ValueError, match="dimensions is 0, expected at least 1"):
        svd_embedding([ann], 0)
