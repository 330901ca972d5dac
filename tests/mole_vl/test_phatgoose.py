"""PHATGOOSE against a plain loop over positions, and what one expert's gate learns alone."""

import pytest
import torch
import torch.nn.functional as F

from mole_vl import mix, mix_from, save_gates
from mole_vl.gates import MoLE, Phatgoose, Usefulness, take_directions
from tests.mole_vl.routing import routed, seen_by
from tests.mole_vl.test_convolutions import Pictures, two
from tests.toys import BLOCKS, Toy, inputs, randomise, three


def directions(experts, model):
    generator = torch.Generator().manual_seed(3)
    return {
        one.name: {
            path: torch.randn(1, model.get_submodule(path).in_features, generator=generator)
            for path in one.layers
        }
        for one in experts
    }


@pytest.mark.parametrize("top_k", [1, 2, None])
@torch.no_grad()
def test_every_layer_is_the_loop(top_k):
    model = Toy()
    experts = three(model)
    learned = directions(experts, model)
    mixture = mix(model, experts, gate=Phatgoose(top_k=top_k, tau=0.5), site="matrix")
    take_directions({s: mixture.gate(s) for s in mixture.sites}, mixture.names, learned)
    seen = seen_by(mixture)
    model(*inputs())
    assert seen.keys() == mixture.layers.keys()
    for path, layer in mixture.layers.items():

        def score(one, v, path=path):
            both = (v, learned[one.name][path][0])
            x, d = ((t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt() for t in both)
            return x @ d / len(v) ** 0.5

        x, y = seen[path]
        expected = routed(experts, path, x, layer.base, score, top_k, 0.5)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_directions_the_base_speaks():
    model = Toy()
    expected = model(*inputs())
    mix(model, three(model), gate=Phatgoose(), site="matrix")
    torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=0)


@torch.no_grad()
def test_one_expert_speaks_by_a_sigmoid_of_its_own():
    model = Toy()
    ann = three(model)[0]
    mixture = mix(model, [ann], gate=Usefulness(), site="matrix")
    with mixture.record() as records:
        model(*inputs())
    assert all((record.output.weights == 0.5).all() for record in records)
    randomise(mixture)
    path = "blocks.1.attention.q"
    layer, seen = mixture.layers[path], {}
    layer.register_forward_hook(lambda _layer, args, y: seen.update(x=args[0], y=y))
    model(*inputs())
    gates = (seen["x"] @ mixture.gate(path).direction.T).sigmoid()
    expected = layer.base(seen["x"]) + gates * F.linear(seen["x"], ann.layers[path].delta())
    torch.testing.assert_close(seen["y"], expected)


def test_directions_are_learned_kept_and_joined(tmp_path):
    model = Toy()
    target = torch.randn(3, 4, 4)
    learned, experts = {}, three(model)
    for one in experts:
        mixture = mix(model, [one], gate=Usefulness(), site="matrix")
        optimizer = torch.optim.Adam(mixture.gates.parameters(), 0.1)
        losses = []
        for _ in range(5):
            loss = (model(*inputs()) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        learned[one.name] = {s: mixture.gate(s).direction.detach() for s in mixture.sites}
        mixture.unmix()
    mixture = mix(model, experts, gate=Phatgoose(top_k=1), site="matrix")
    take_directions({s: mixture.gate(s) for s in mixture.sites}, mixture.names, learned)
    expected = model(*inputs())
    save_gates(mixture, tmp_path / "gates.safetensors")
    again = mix_from(mixture.unmix(), experts[::-1], tmp_path / "gates.safetensors")
    assert again.spec == Phatgoose(top_k=1)
    torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=0)


def test_what_was_not_learned_and_what_fits_nowhere_is_named():
    model = Toy()
    experts = three(model)
    learned = directions(experts, model)
    mixture = mix(model, experts, gate=Phatgoose(), site="matrix")
    gates = {s: mixture.gate(s) for s in mixture.sites}
    with pytest.raises(ValueError, match="nothing was learned for bob"):
        take_directions(gates, mixture.names, {**learned, "bob": {}})
    with pytest.raises(ValueError, match="directions are for elsewhere, where no gate is"):
        take_directions(gates, mixture.names, {**learned, "bob": {"elsewhere": torch.ones(1, 6)}})


def test_shared_sites_and_company_are_refused():
    model = Toy()
    with pytest.raises(ValueError, match="for one expert alone, and the mixture has 3"):
        mix(model, three(model), gate=Usefulness(), site="matrix")
    with pytest.raises(ValueError, match=r"site 'blocks.0' holds 4: use site='matrix'"):
        mix(model, three(model), gate=Phatgoose(), site="block", blocks=BLOCKS)
    pictures = Pictures()
    with pytest.raises(ValueError, match="is a convolution"):
        mix(pictures, two(pictures), gate=Phatgoose(), site="matrix")
    with pytest.raises(ValueError, match="top_k is 0"):
        Phatgoose(top_k=0)
    assert mix(model, three(model), gate=MoLE(), site="matrix").names == ("ann", "bob", "cyd")
