"""What a mixed model computes, and the way back to its base."""

import copy

import pytest
import torch
from torch import nn

from mole_vl import mix
from mole_vl.gates import (
    Average,
    Constants,
    Free,
    GateInput,
    Hidden,
    MoLE,
    Responses,
    ScaledSoftmax,
    Sigmoid,
    Softmax,
    Sum,
)
from mole_vl.passes import Conditions, Pass
from tests.toys import (
    BLOCKS,
    SITES,
    Toy,
    expert,
    inputs,
    randomise,
    three,
    with_constant_weights,
)

SCORES = [Hidden(), Responses(), Free()]
NORMALISERS = [Softmax(), ScaledSoftmax(), Sigmoid()]


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("normaliser", "weight"), [(Softmax(), 1 / 3), (ScaledSoftmax(), 1.0), (Sigmoid(), 1.0)]
)
def test_untrained_gates_are_the_merge(site, score, normaliser, weight):
    model = Toy()
    experts = three(model)
    x, context = inputs()
    expected = with_constant_weights(
        model, experts, dict.fromkeys(["ann", "bob", "cyd"], weight), x, context
    )
    mix(model, experts, gate=MoLE(score=score, normaliser=normaliser), **site, blocks=BLOCKS)
    torch.testing.assert_close(model(x, context), expected)


@pytest.mark.parametrize(
    "gate", [Sum(), Average(), Constants(weights={"ann": 0.2, "bob": -1.0, "cyd": 3.0})]
)
def test_constants_are_weight_arithmetic(gate):
    model = Toy()
    experts = three(model)
    values = {Sum: (1.0, 1.0, 1.0), Average: (1 / 3,) * 3}.get(type(gate), (0.2, -1.0, 3.0))
    x, context = inputs()
    expected = with_constant_weights(
        model, experts, dict(zip(["ann", "bob", "cyd"], values, strict=True)), x, context
    )
    mixture = mix(model, experts, gate=gate, site="network", blocks=BLOCKS)
    torch.testing.assert_close(model(x, context), expected)
    mixture.bake()
    torch.testing.assert_close(model(x, context), expected)


def loop_forward(model: Toy, experts, mixture, x, context):
    """A naive mixture at block sites: for each linear layer, a loop over experts."""
    weights_at = {}

    def replace(path, block):
        base = base_of(model, path)

        def run(z):
            y = torch.nn.functional.linear(z, base.weight, base.bias)
            for index, one in enumerate(experts):
                if path in one.layers:
                    factors = one.layers[path]
                    w = weights_at[block][..., index]
                    w = w.reshape(*w.shape, *(1,) * (z.dim() - w.dim()))
                    y = y + w * (factors.scale * (z @ factors.a.T @ factors.b.T))
            return y

        return run

    def base_of(model, path):
        layer = model.get_submodule(path)
        return getattr(layer, "base", layer)

    h = model.inlet(x)
    for name in BLOCKS:
        gate = mixture.gate(name)
        score = gate.score
        over_rows = gate.over == "row"
        source = torch.nn.functional.normalize(h, dim=-1).mean(1) if over_rows else h
        if hasattr(score, "weight") and score.weight.dim() == 2:
            for shift in (0.0, score.centre):
                source = torch.nn.functional.normalize(source - shift, dim=-1)
                source = source * source.shape[-1] ** 0.5
            features = source
            logits = features @ score.weight.T + score.bias
        else:
            parts = []
            readers = [
                p for p in mixture.sites[name].matrices if base_of(model, p).in_features == 6
            ]
            for index in range(len(experts)):
                for path in readers:
                    one = experts[index].layers.get(path)
                    out = base_of(model, path).out_features
                    if one is None:
                        parts.append(torch.zeros(*source.shape[:-1], out))
                    else:
                        parts.append(one.scale * (source @ one.a.T @ one.b.T))
            flat = torch.nn.functional.normalize(torch.cat(parts, -1), dim=-1)
            flat = flat * flat.shape[-1] ** 0.5
            logits = flat @ score.weight.flatten(1).T + score.bias
        weights_at[name] = gate.normaliser(logits)
        q = replace(f"{name}.attention.q", name)
        k = replace(f"{name}.attention.k", name)
        h = h + (q(h) + k(context).mean(1, keepdim=True)).tanh()
        up, down = replace(f"{name}.ff.0", name), replace(f"{name}.ff.2", name)
        h = h + down(torch.nn.functional.gelu(up(h)))
    return model.outlet(h)


@pytest.mark.parametrize("score", [Hidden(), Responses()])
@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("over", ["row", "position"])
def test_block_gates_equal_the_plain_loop_in_value_and_gradients(score, normaliser, over):
    model = Toy()
    experts = three(model)
    if over == "position":  # keys read another sequence: weights by position cannot reach them
        experts = [
            experts[0],
            expert("dan", model, ["blocks.0.ff.0", "blocks.1.ff.2"], [3, 2], seed=4),
        ]
    x, context = inputs()
    x.requires_grad_()
    mixture = mix(
        model, experts, gate=MoLE(score=score, normaliser=normaliser, over=over), blocks=BLOCKS
    )
    randomise(mixture)
    probe = torch.randn(3, 4, 4)
    parameters = [x, *mixture.parameters()]
    ours = model(x, context)
    theirs = loop_forward(model, experts, mixture, x, context)
    torch.testing.assert_close(ours, theirs)
    for got, want in zip(
        torch.autograd.grad((ours * probe).sum(), parameters),
        torch.autograd.grad((theirs * probe).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_unmix_gives_the_base_back_bit_for_bit(site):
    model = Toy()
    model.outlet.requires_grad_(False)
    before = copy.deepcopy(model)
    x, context = inputs()
    mixture = mix(model, three(model), gate=MoLE(), **site, blocks=BLOCKS)
    randomise(mixture)
    assert not torch.equal(model(x, context), before(x, context))
    with mixture.disabled():
        assert torch.equal(model(x, context), before(x, context))
    mixture.bake({"ann": 0.3, "bob": 0.1})
    assert not torch.equal(model(x, context), before(x, context))
    assert mixture.unmix() is model
    assert str(model) == str(before)
    for (name, now), (_, then) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(now, then), name
        assert now.requires_grad == then.requires_grad, name
    assert torch.equal(model(x, context), before(x, context))
    mix(model, three(model), gate=Sum(), site="matrix")


def test_state_dict_has_the_base_keys_and_each_tensor_once():
    model = Toy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    assert mixture.base_state_dict().keys() == before.keys()
    extra = set(model.state_dict()) - set(before)
    assert extra and all(key.startswith("mixture.gates.") for key in extra)
    pointers = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    assert len(pointers) == len(set(pointers))
    randomise(mixture)
    other = Toy()
    mix(other, three(Toy()), gate=MoLE(), blocks=BLOCKS)
    other.load_state_dict(model.state_dict())
    x, context = inputs()
    assert torch.equal(other(x, context), model(x, context))


def test_a_copied_model_is_a_mixture_of_its_own():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    randomise(mixture)
    x, context = inputs()
    expected = model(x, context)
    twin = copy.deepcopy(model)
    randomise(mixture, seed=9)
    assert torch.equal(twin(x, context), expected)
    with twin.mixture.disabled():
        assert not torch.equal(twin(x, context), expected)
        assert not torch.equal(model(x, context), expected)


@pytest.mark.parametrize("score", [Hidden(), Responses()])
def test_scores_are_fp32_under_autocast(score):
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(score=score), blocks=BLOCKS)
    randomise(mixture)
    x = torch.randn(2, 4, 6)
    gate, readers = mixture.gate("blocks.0"), mixture._answers.bank.readers["blocks.0"]
    expected = gate(GateInput(x), readers).logits
    with mixture.record() as records, torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs())
        mixed = mixture._answers.result("blocks.0", x, Pass(Conditions(), {}, 0, True, model))
    assert {record.output.logits.dtype for record in records} == {torch.float32}
    torch.testing.assert_close(mixed.logits, expected)


def test_autocast_agrees_to_its_tolerance():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    randomise(mixture, size=0.2)
    expected = model(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(*inputs())
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_scales_and_constants_stay_exact_when_a_model_is_cast():
    model = Toy()
    mixture = mix(model, three(model), gate=Average(), site="matrix")
    before = {path: layer.scales.clone() for path, layer in mixture.layers.items()}
    model.to(torch.bfloat16).float()
    assert all(torch.equal(layer.scales, before[path]) for path, layer in mixture.layers.items())
    assert mixture.gate("blocks.0.ff.0").values.tolist() == torch.full((3,), 1 / 3).tolist()


def test_any_model_can_be_a_root_and_any_name_a_site():
    class Values(nn.Sequential):
        def __init__(self):
            super().__init__()
            self.values = nn.Linear(3, 3)

    model = Values()
    x = torch.randn(2, 3)
    lone = expert("eve", model, ["values"], [2])
    expected = model(x) + x @ lone.layers["values"].delta().T
    mix(model, [lone], gate=Sum(), site="matrix")
    torch.testing.assert_close(model(x), expected)


def test_padding_of_any_value_reaches_neither_pool_nor_gradient():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    randomise(mixture)
    x = torch.randn(2, 4, 6)
    x[:, 3] = float("inf")
    x.requires_grad_()
    pool = torch.tensor([[True, True, True, False]] * 2)
    logits = mixture.gate("blocks.0")(GateInput(x, pool), ()).logits
    clean = mixture.gate("blocks.0")(GateInput(x[:, :3]), ()).logits
    torch.testing.assert_close(logits, clean)
    (grad,) = torch.autograd.grad(logits.sum(), x)
    assert torch.isfinite(grad).all()
    with pytest.raises(ValueError, match="got \\(2, 4, 4, 6\\)"):
        mixture.gate("blocks.0")(GateInput(torch.zeros(2, 4, 4, 6)), ())
