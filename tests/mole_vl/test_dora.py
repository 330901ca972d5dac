"""DoRAs in mixtures, against the weight that each stands for."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mole_vl import Expert, Factors, mix
from mole_vl.dora import changed_norms, row_norms
from mole_vl.gates import Router, Sum, TopK
from mole_vl.layers import Chosen, MixtureLinear
from mole_vl.merge import merged
from mole_vl.stack import Learning
from tests.mole_vl.test_feedforward import BLOCKS, FEED_FORWARD, KINDS, Net, falling, x_of
from tests.toys import Toy, inputs, three


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dora(rank, width, out, seed):
    return Factors(
        normal(rank, width, seed=seed),
        normal(out, rank, seed=seed + 1),
        0.4,
        normal(out, seed=seed + 2).abs() + 0.5,
    )


def changed(weight, factors):
    """The whole weight under one expert, its norm a constant."""
    moved = weight + factors.scale * factors.b @ factors.a
    if factors.magnitude is None:
        return moved
    return (factors.magnitude / moved.detach().norm(dim=1)).unsqueeze(1) * moved


def family(kinds=("dora", "lora", None, "dora"), width=6, out=5):
    found = []
    for place, kind in enumerate(kinds):
        one = dora(place + 1, width, out, 10 * place)
        plain = Factors(one.a, one.b, one.scale)
        found.append({"dora": one, "lora": plain, None: None}[kind])
    return found


def expected(base, factors, x, weights, chosen=None):
    """`W x + b + sum_e w_e (W'_e - W) x`, each row's own weights."""
    y = base(x)
    every = weights if chosen is None else torch.zeros(*weights.shape[:-1], len(factors))
    if chosen is not None:
        every = every.scatter(-1, chosen, weights)
    every = every.reshape(*every.shape[:-1], *[1] * (x.dim() - every.dim()), len(factors))
    for place, one in enumerate(factors):
        if one is not None:
            y = y + every[..., place, None] * (x @ (changed(base.weight, one) - base.weight).T)
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("over", ["nothing", "rows", "places", "chosen rows", "chosen places"])
@torch.no_grad()
def test_a_layer_of_doras_and_loras(bias, over):
    torch.manual_seed(0)
    base, factors = nn.Linear(6, 5, bias=bias), family()
    x = normal(2, 3, 6, seed=7)
    lead = {"nothing": (), "rows": (2,), "places": (2, 3)}[over.removeprefix("chosen ")]
    chosen = None
    if over.startswith("chosen"):
        chosen = torch.tensor([[3, 1], [0, 2]])
        chosen = chosen if lead == (2,) else chosen[:, None].expand(2, 3, 2)
    weights = normal(*lead, 4 if chosen is None else 2, seed=8)
    layer = MixtureLinear("layer", base, factors, lambda rows: Chosen(weights, chosen))
    torch.testing.assert_close(layer(x), expected(base, factors, x, weights, chosen))


def test_whoever_asks_a_frozen_dora_first_decides_nothing():
    torch.manual_seed(0)
    base, x, weights = nn.Linear(6, 5), normal(2, 3, 6, seed=7), normal(4, seed=8)
    weights.requires_grad_()
    first, second = (
        MixtureLinear("layer", base, family(), lambda _: Chosen(weights, None)) for _ in range(2)
    )
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first(x)
    assert torch.equal(first(x), second(x))
    first(x).sum().backward()
    assert weights.grad is not None and weights.grad.any()


@pytest.mark.parametrize("learning", [None, Learning()])
@torch.no_grad()
def test_the_norms_of_frozen_doras_are_found_once(learning):
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), normal(2, 3, 6, seed=7)
    weights = normal(4, seed=8)
    layer = MixtureLinear("layer", base, family(), lambda _: Chosen(weights, None), learning)
    layer(x)
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    expected = layer(x)
    assert len(calls) == (1 if learning is None else 2)
    moved = layer.double()(x.double())
    torch.testing.assert_close(moved, expected.double(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_norms_without_reading_the_weight():
    torch.manual_seed(0)
    base, factors = nn.Linear(6, 5), family(("dora",) * 3)
    torch.testing.assert_close(row_norms(base, 6), base.weight.norm(dim=1))
    ranks = torch.tensor([f.rank for f in factors])
    found = changed_norms(
        base,
        row_norms(base, 6),
        torch.cat([f.a for f in factors]),
        torch.cat([f.b for f in factors], 1),
        torch.full((int(ranks.sum()),), 0.4),
        torch.repeat_interleave(torch.arange(3), ranks),
        3,
    )
    wanted = [(base.weight + f.scale * f.b @ f.a).norm(dim=1) for f in factors]
    torch.testing.assert_close(found, torch.stack(wanted))


def test_gradients_of_doras_that_learn():
    torch.manual_seed(0)
    base, factors = nn.Linear(6, 5), family()
    x, weights = normal(2, 3, 6, seed=7), normal(4, seed=8)
    layer = MixtureLinear("layer", base, factors, lambda _: Chosen(weights, None), Learning())
    leaves = {
        (place, name): tensor.clone().requires_grad_()
        for place, one in enumerate(factors)
        if one is not None
        for name, tensor in one.tensors().items()
    }
    twins = [
        None if one is None else Factors(
            leaves[p, "a"], leaves[p, "b"], one.scale, leaves.get((p, "magnitude"))
        )
        for p, one in enumerate(factors)
    ]  # fmt: skip
    (layer(x) ** 2).sum().backward()
    (expected(base, twins, x, weights) ** 2).sum().backward()
    grads = [layer.get_parameter(f"stack.{name}.0").grad for name in ("downs", "ups")]
    wanted = [
        torch.cat([leaves[p, name].grad for p, one in enumerate(factors) if one], axis)
        for name, axis in (("a", 0), ("b", 1))
    ]
    torch.testing.assert_close(grads, [wanted[0], wanted[1].T])
    magnitudes = [leaf.grad for (_, name), leaf in leaves.items() if name == "magnitude"]
    found = layer.get_parameter("rescaling.magnitudes.0").grad
    torch.testing.assert_close(found, torch.stack(magnitudes))
    assert len(layer.own_names) == 3


@torch.no_grad()
def test_a_dora_that_learns_has_under_autocast_the_norms_that_it_is_saved_with():
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = MixtureLinear("layer", base, family(), lambda _: None, Learning())
    expected = layer.shift()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.shift()
    assert torch.equal(found, expected)
    assert expected.any()


@torch.no_grad()
def test_baked_doras_are_the_mixture_and_have_no_low_rank():
    model = Toy()
    experts = [
        Expert(
            one.name,
            {
                path: Factors(f.a, f.b, f.scale, normal(f.b.shape[0], seed=3).abs())
                for path, f in one.layers.items()
            },
        )
        for one in three(model)
    ]
    mixture = mix(model, experts, gate=Sum(), site="matrix")
    before = model(*inputs())
    with pytest.raises(ValueError, match="which no low rank holds"):
        merged(mixture, "one")
    mixture.bake()
    torch.testing.assert_close(model(*inputs()), before, rtol=1e-4, atol=1e-5)
    mixture.unmix()
    assert torch.equal(model(*inputs()), Toy.forward(model, *inputs()))
    with pytest.raises(ValueError, match="hangs on the base"):
        experts[0].layers["blocks.0.attention.q"].delta()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_feed_forward_of_doras(kind):
    net = Net(KINDS[kind]).eval()
    paths = [f"blocks.{b}.mlp.{name}" for b in range(2) for name in FEED_FORWARD[kind]]
    experts = []
    for place in range(3):
        layers = {}
        for number, path in enumerate(paths):
            layer = net.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            layers[path] = dora(4, layer.in_features, layer.out_features, 20 * place + number)
        experts.append(Expert(f"e{place}", layers))
    gate = Router(choice=TopK(k=2), spread=1.0)
    mixture = mix(net, experts, gate=gate, site="feedforward", blocks=BLOCKS)
    routers: list = [mixture.gate(f"blocks.{b}.mlp").weight for b in range(2)]
    plain, x = Net(KINDS[kind]).eval(), x_of()
    for number, block in enumerate(plain.blocks):
        x = x + block.attention(x)
        rows = []
        for v in x.flatten(0, 1):
            best = sorted(enumerate((routers[number] @ v).softmax(0)), key=falling)[:2]
            y = 0.0
            for share, expert in [(s, experts[e]) for e, s in best]:
                own: dict = dict(block.mlp.named_parameters())
                for name in FEED_FORWARD[kind]:
                    factors = expert.layers[f"blocks.{number}.mlp.{name}"]
                    own[f"{name}.weight"] = changed(own[f"{name}.weight"], factors)
                whole = sum(s for _, s in best)
                y = y + share / whole * functional_call(block.mlp, own, (v[None],))[0]
            rows.append(y)
        x = x + torch.stack(rows).view(x.shape)
    torch.testing.assert_close(net(x_of()), x, rtol=1e-4, atol=1e-5)
