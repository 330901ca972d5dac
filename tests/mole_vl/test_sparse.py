"""The plans of few experts, against the plain loop over experts: values and every gradient."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from mole_vl.experts import Factors
from mole_vl.layers import Chosen, MixtureLinear
from mole_vl.sparse import per_sample, sparse

# Ranks of one kind take the grouped product where strides allow it, others the segments.
RANKS = st.one_of(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 9)).map(lambda t: [t[0]] * t[1]),
    st.lists(st.integers(0, 5), min_size=1, max_size=7).filter(any),
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def loop(x, a, b, weights, chosen, ranks):
    """For each expert its update of every position, weighed by what the position gives it."""
    y, start = x.new_zeros(*x.shape[:-1], b.shape[0]), 0
    for expert, rank in enumerate(ranks):
        given_ = (weights * (chosen == expert)).sum(-1)
        given_ = given_.reshape(*given_.shape, *[1] * (x.dim() - given_.dim()))
        own = slice(start, start + rank)
        y = y + given_ * ((x @ a[own].T) @ b[:, own].T)
        start += rank
    return y


def drawn(ranks, lead, k, width, out, seed, dtype):
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=chance, dtype=torch.float64).to(dtype)

    a, b = normal(sum(ranks), width), normal(out, sum(ranks))
    chosen = torch.rand(*lead, len(ranks), generator=chance).argsort(-1)[..., :k]
    return a, b, normal(*lead, k), chosen


def values(plan, dtype, positive, x, a, b, weights, chosen, ranks):
    """Output and gradients of everything; of absolute values alone, where asked."""
    kind = torch.abs if positive else torch.clone
    leaves = [kind(t).to(dtype).requires_grad_() for t in (x, a, b, weights)]
    y = plan(*leaves, chosen, ranks)
    answer = kind(torch.linspace(-1, 1, y.numel(), dtype=torch.float64)).view(y.shape)
    (y * answer.to(dtype)).sum().backward()
    return [y.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def agree(plan, tolerance, *arguments):
    found = values(plan, arguments[0].dtype, False, *arguments)
    wanted = values(loop, torch.float64, False, *arguments)
    # What was added up, signs aside: rounding is a part of that, whatever the sum comes to.
    scale = values(loop, torch.float64, True, *arguments)
    for name, *three in zip(("y", "x", "a", "b", "weights"), found, wanted, scale, strict=True):
        one, other, size = three
        assert ((one - other).abs() <= tolerance * size + 1e-30).all(), name


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.03}


@settings(deadline=None, max_examples=60)
@given(
    ranks=RANKS,
    k=st.integers(1, 3),
    lead=st.sampled_from([(1,), (7,), (2, 5), (3, 0)]),
    width=st.sampled_from([3, 8, 16]),
    out=st.sampled_from([1, 8, 24]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_positions_have_what_the_loop_gives_them(ranks, k, lead, width, out, dtype, seed):
    a, b, weights, chosen = drawn(ranks, lead, min(k, len(ranks)), width, out, seed, dtype)
    x = torch.randn(*lead, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if x.numel():
        agree(sparse, TOLERANCE[dtype], x, a, b, weights, chosen, ranks)
    else:
        assert sparse(x, a, b, weights, chosen, ranks).shape == (*lead, out)


@settings(deadline=None, max_examples=60)
@given(
    ranks=RANKS,
    k=st.integers(1, 3),
    rows=st.integers(0, 4),
    between=st.sampled_from([(), (5,), (2, 3)]),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_rows_have_what_the_loop_gives_them(ranks, k, rows, between, dtype, seed):
    a, b, weights, chosen = drawn(ranks, (rows,), min(k, len(ranks)), 6, 5, seed, dtype)
    x = torch.randn(rows, *between, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    agree(per_sample, TOLERANCE[dtype], x, a, b, weights, chosen, ranks)


@pytest.mark.parametrize("ranks", [[8, 8, 8], [8, 4, 2]], ids=["grouped", "segments"])
def test_under_autocast_its_products_are_those_of_half_precision(ranks):
    a, b, weights, chosen = drawn(ranks, (9,), 2, 16, 24, 0, torch.float32)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))

    def half(*arguments):
        return sparse(*(one.bfloat16() for one in arguments[:4]), *arguments[4:]).float()

    def cast(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return sparse(*arguments).float()

    wanted, found = (
        values(plan, torch.float32, False, x, a, b, weights, chosen, ranks) for plan in (half, cast)
    )
    assert found[0].equal(wanted[0])
    # Gradients are added up in single precision there.
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("ranks", [[8] * 8, [8, 4, 2, 1] * 2], ids=["grouped", "segments"])
def test_of_half_precision_inputs_gradients_add_up_in_the_factors_type(ranks):
    a, b, weights, chosen = drawn(ranks, (9,), 8, 16, 24, 0, torch.float32)
    half = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = []
    for x in (half.clone(), half.float()):
        sparse(x.requires_grad_(), a, b, weights, chosen, ranks).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].equal(gradients[1].bfloat16())


@pytest.mark.parametrize("rank", [4, 3])
def test_all_positions_of_one_expert_and_none_of_another(rank):
    ranks = [rank] * 5
    a, b, weights, _ = drawn(ranks, (6,), 1, 8, 8, 0, torch.float32)
    chosen = torch.full((6, 1), 3)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    agree(sparse, 1e-5, x, a, b, weights, chosen, ranks)


@pytest.mark.parametrize("over", [1, 2], ids=["rows", "positions"])
def test_a_layer_that_reads_more_axes_than_its_gate_weighs(over):
    ranks = [2, 3, 1]
    a, b, weights, chosen = drawn(ranks, (2, 3)[:over], 2, 4, 5, 0, torch.float32)
    factors = [
        Factors(one, other, 1.0)
        for one, other in zip(a.split(ranks), b.split(ranks, 1), strict=True)
    ]
    base, x = nn.Linear(4, 5), torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(1))
    layer = MixtureLinear("layer", base, factors, lambda rows: Chosen(weights, chosen))
    torch.testing.assert_close(layer(x) - base(x), loop(x, a, b, weights, chosen, ranks))


def test_compiled_it_says_the_same():
    ranks = [4, 4, 4]
    draw = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=draw) for shape in ((6, 8), (12, 8), (8, 12)))
    weights, chosen = torch.rand(6, 2, generator=draw), torch.tensor([[0, 2], [1, 0]] * 3)
    compiled = torch.compile(sparse, backend="eager")
    found = compiled(x, a, b, weights, chosen, ranks)
    torch.testing.assert_close(found, loop(x, a, b, weights, chosen, ranks))
