"""Arrow against a plain loop over positions, with experts of any rank on any layers."""

from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call

from mole_vl import Expert, Factors, mix, mix_from, save_gates
from mole_vl.gates import Arrow
from tests.mole_vl.routing import routed, seen_by
from tests.mole_vl.test_convolutions import Pictures, two
from tests.toys import BLOCKS, Toy, inputs, three


def by_loop(experts, path, *rest, **settings):
    def score(one, v):
        _u, _s, vh = torch.linalg.svd(one.layers[path].delta().double())
        return abs(vh[0].float() @ v)

    return routed(experts, path, *rest, score=score, **settings)


@pytest.mark.parametrize("top_k", [1, 2, None])
@torch.no_grad()
def test_every_layer_is_the_loop(top_k):
    model = Toy()
    experts = three(model)
    mixture = mix(model, experts, gate=Arrow(top_k=top_k, tau=0.7), site="matrix")
    seen = seen_by(mixture)
    for masked in ((), ("bob",)):
        with mixture.masked(masked) if masked else nullcontext():
            model(*inputs())
        assert seen.keys() == mixture.layers.keys()
        for path, layer in mixture.layers.items():
            x, y = seen.pop(path)
            expected = by_loop(experts, path, x, layer.base, top_k=top_k, tau=0.7, masked=masked)
            torch.testing.assert_close(y, expected)


@torch.no_grad()
def test_a_rotation_in_rank_space_changes_nothing():
    model = Toy()
    experts = three(model)
    mixture = mix(model, experts, gate=Arrow(top_k=2), site="matrix")
    expected = model(*inputs())
    mixture.unmix()
    turned = []
    for one in experts:
        layers = {}
        for path, factors in one.layers.items():
            q, _ = torch.linalg.qr(torch.randn(factors.rank, factors.rank))
            layers[path] = Factors(q @ factors.a, factors.b @ q.T, factors.scale)
        turned.append(Expert(one.name, layers))
    mix(model, turned, gate=Arrow(top_k=2), site="matrix")
    torch.testing.assert_close(model(*inputs()), expected)


def test_of_equal_scores_the_lower_index_is_taken():
    model = Toy()
    first = three(model)[0]
    twins = [first, Expert("dan", first.layers), Expert("eve", first.layers)]
    mixture = mix(model, twins, gate=Arrow(top_k=2), site="matrix")
    with mixture.record() as records:
        model(*inputs())
    for record in records:
        expected = torch.tensor([0.5, 0.5, 0.0]).expand_as(record.output.weights)
        torch.testing.assert_close(record.output.weights, expected)


@torch.no_grad()
def test_an_update_of_nothing_gets_no_weight():
    model = Toy()
    ann = three(model)[0]
    silent = {p: Factors(f.a, torch.zeros_like(f.b), f.scale) for p, f in ann.layers.items()}
    mixture = mix(model, [Expert("nil", silent), ann], gate=Arrow(), site="matrix")
    with mixture.record() as records:
        model(*inputs())
    assert records
    for record in records:
        assert (record.output.weights == torch.tensor([0.0, 1.0])).all()


@torch.no_grad()
def test_the_file_gives_the_same_gates(tmp_path):
    model = Toy()
    mixture = mix(model, three(model), gate=Arrow(top_k=2, tau=0.5), site="matrix")
    expected = model(*inputs())
    save_gates(mixture, tmp_path / "gates.safetensors")
    again = mix_from(mixture.unmix(), three(model)[::-1], tmp_path / "gates.safetensors")
    assert again.spec == Arrow(top_k=2, tau=0.5)
    torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"top_k": 0}, "top_k is 0"), ({"tau": 0.0}, "tau is 0.0, expected a positive")],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Arrow(**settings)


def test_shared_sites_convolutions_and_slots_are_refused():
    model = Toy()
    with pytest.raises(ValueError, match=r"site 'blocks.0' holds 4: use site='matrix'"):
        mix(model, three(model), gate=Arrow(), site="block", blocks=BLOCKS)
    slots = {"one": ["ann", "bob"], "other": ["cyd"]}
    with pytest.raises(ValueError, match="a slot has many"):
        mix(model, three(model), gate=Arrow(), site="matrix", slots=slots)
    assert not hasattr(model, "mixture")
    pictures = Pictures()
    with pytest.raises(ValueError, match="is a convolution, which mixes positions"):
        mix(pictures, two(pictures), gate=Arrow(), site="matrix")


@torch.no_grad()
def test_weights_at_one_layer_do_not_read_later_positions():
    model = Toy()
    mix(model, three(model), gate=Arrow(top_k=1), site="matrix")
    x, context = inputs()
    changed = x.clone()
    changed[:, -1] += 1.0
    short, long = model(x, context)[:, :-1], model(changed, context)[:, :-1]
    torch.testing.assert_close(short, long, rtol=0, atol=0)
    # Functional calls go through the same layers.
    again = functional_call(model, dict(model.named_parameters()), (x, context))
    torch.testing.assert_close(again[:, :-1], short, rtol=0, atol=0)
