"""Which layers share a gate, and what that gate reads."""

import pytest
import torch
from torch.nn.functional import normalize

from mole_vl import mix
from mole_vl.gates import Average, MoLE, ScaledSoftmax, Softmax
from tests.toys import BLOCKS, Toy, inputs, randomise, three


def test_a_late_network_gate_reads_the_later_block_and_the_earlier_ones_are_constant():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), site="network", after=1, blocks=BLOCKS)
    below, network = mixture.layout.sites
    assert all(path.startswith("blocks.0.") for path in below.matrices)
    assert all(path.startswith("blocks.1.") for path in network.matrices)
    randomise(mixture)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with mixture.record() as records:
        found = model(*inputs())
    weights = {record.site: record.output.weights for record in records}
    gate = mixture.gate("network")
    pooled = normalize(normalize(seen[0], dim=-1).mean(1), dim=-1) * 6**0.5
    features = normalize(pooled - gate.score.centre, dim=-1) * 6**0.5
    by_hand = gate.normaliser(features @ gate.score.weight.T + gate.score.bias)
    torch.testing.assert_close(weights["network"], by_hand)
    below_gate = mixture.gate("below")
    torch.testing.assert_close(weights["below"], below_gate.normaliser(below_gate.score.logits))
    with mixture.pinned(weights):
        torch.testing.assert_close(model(*inputs()), found)
    found.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in mixture.parameters())


def test_constant_gates_are_the_same_below():
    model = Toy()
    x, context = inputs()
    mixture = mix(model, three(model), gate=Average(), site="network", blocks=BLOCKS)
    expected = model(x, context)
    mixture.unmix()
    mix(model, three(model), gate=Average(), site="network", after=1, blocks=BLOCKS)
    torch.testing.assert_close(model(x, context), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"site": "network", "after": 2}, "only 2 blocks carry experts"),
        ({"site": "network", "after": -1}, "after is -1"),
        ({"site": "block", "after": 1}, "'network' and 'preview', not 'block': set after to 0"),
        ({"site": "netwrok"}, "kind is 'netwrok'"),
    ],
)
def test_a_placement_that_cannot_be_is_refused_and_changes_nothing(given, message):
    model = Toy()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        mix(model, three(model), gate=MoLE(normaliser=Softmax()), blocks=BLOCKS, **given)
    assert str(model) == before


def test_a_handle_shows_which_layers_share_a_gate_and_which_gate_it_is():
    model = Toy()
    mixture = mix(
        model, three(model), gate=MoLE(normaliser=ScaledSoftmax(total=2.0)), blocks=BLOCKS
    )
    lines = [line.strip() for line in str(mixture).splitlines()]
    normaliser = "ScaledSoftmax(total=2.0, tau_low=0.25, tau_high=4.0)"
    assert "experts: ann, bob, cyd" in lines
    rest = "over='row', top_k=None, preview='base'"
    assert f"gate: MoLE(score=Hidden(pool=('mean',)), normaliser={normaliser}, {rest})" in lines
    assert "blocks.0: 4 layers (attention.q, attention.k, ff.0 and 1 more)" in lines
    assert "blocks.1: 2 layers (attention.q, attention.k)" in lines
    assert normaliser in str(mixture.gate("blocks.0"))
    mixture.unmix()
    lone = str(mix(model, three(model), gate=MoLE(), site="matrix"))
    assert "\n    blocks.0.attention.q\n" in lone
