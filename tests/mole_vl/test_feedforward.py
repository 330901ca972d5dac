"""The feed-forward mixture against `sum_e g_e FF(x; W + Delta-W_e)`, position by position."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mole_vl import Expert, Factors, mix
from mole_vl.gates import Choice, Router, Sum, Switch, TopK, TopP
from mole_vl.stack import Learning


class Gated(nn.Module):
    def __init__(self, width, hidden, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """With a bias, a dropout inside, and another behind."""

    def __init__(self, width, hidden):
        super().__init__()
        self.wi = nn.Linear(width, hidden)
        self.inner, self.outer = nn.Dropout(0.1), nn.Dropout(0.1)
        self.wo = nn.Linear(hidden, width)

    def forward(self, hidden_states):
        return self.outer(self.wo(self.inner(F.gelu(self.wi(hidden_states)))))


class Fused(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(gate.sigmoid() * up)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x):
        return self.o(self.q(x).cumsum(1).tanh())


class Block(nn.Module):
    def __init__(self, width, mlp):
        super().__init__()
        self.attention = Attention(width)
        self.mlp = mlp

    def forward(self, x):
        x = x + self.attention(x)
        if isinstance(self.mlp, Plain):
            return x + self.mlp(hidden_states=x)
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, kind, width=8, hidden=12, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks: Any = nn.ModuleList([Block(width, kind(width, hidden)) for _ in range(2)])
        self.checkpointing = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


BLOCKS = {"blocks.0": 8, "blocks.1": 8}
KINDS = {
    "gated": Gated,
    "biased": lambda w, h: Gated(w, h, bias=True),
    "plain": Plain,
    "fused": Fused,
}
FEED_FORWARD = {
    name: [path for path, module in kind(8, 12).named_modules() if isinstance(module, nn.Linear)]
    for name, kind in KINDS.items()
}


def drawn(name, net, paths, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in paths:
        layer = net.get_submodule(path)
        layers[path] = Factors(
            torch.randn(rank, layer.in_features, generator=generator) / 3,
            torch.randn(layer.out_features, rank, generator=generator) / 3,
            0.5 + 0.25 * seed,
        )
    return Expert(name, layers)


def family(net, kind, experts=4, ranks=(4, 4, 4, 4), leave_out=()):
    """Experts of the feed-forwards, and one of the attention."""
    own = [
        f"blocks.{b}.mlp.{name}"
        for b in range(2)
        for name in FEED_FORWARD[kind]
        if name not in leave_out
    ]
    found = [drawn(f"e{i}", net, own, ranks[i], i) for i in range(experts)]
    attention = [f"blocks.{b}.attention.{name}" for b in range(2) for name in "qo"]
    return [*found, drawn("attention", net, attention, 3, 9)]


def changed(module, prefix, expert) -> Any:
    """The parameters of a module under one expert."""
    own = dict(module.named_parameters())
    for path, factors in expert.layers.items():
        if path.startswith(f"{prefix}."):
            name = f"{path.removeprefix(f'{prefix}.')}.weight"
            own[name] = own[name] + factors.scale * factors.b @ factors.a
    return own


def reference(net, experts, routers, route, x):
    """Every position through the feed-forward of each of its experts, one at a time."""
    *own, attention = experts
    for number, block in enumerate(net.blocks):
        at = f"blocks.{number}"
        x = x + functional_call(
            block.attention, changed(block.attention, f"{at}.attention", attention), (x,)
        )
        rows = []
        for row in x:
            out = []
            for v in row:
                y = 0.0
                for share, expert in route(routers[number] @ v):
                    parameters = (
                        dict(block.mlp.named_parameters())
                        if expert is None
                        else changed(block.mlp, f"{at}.mlp", own[expert])
                    )
                    y = y + share * functional_call(block.mlp, parameters, (v[None],))[0]
                out.append(y)
            rows.append(torch.stack(out))
        x = x + torch.stack(rows)
    return x


def falling(one):
    return -float(one[1].detach())


def top_k(k):
    def route(logits):
        best = sorted(enumerate(logits.softmax(0)), key=falling)[:k]
        whole = sum(share for _, share in best)
        return [(share / whole, expert) for expert, share in best]

    return route


def top_p(p):
    def route(logits):
        best, whole = [], 0.0
        for expert, share in sorted(enumerate(logits.softmax(0)), key=falling):
            if float(torch.as_tensor(whole).detach()) >= p:
                break
            best.append((share, expert))
            whole = whole + share
        return [(share / whole, expert) for share, expert in best]

    return route


TWO: Choice = TopK(k=2)
LEARNING: Learning | None = Learning()


def mixed(
    kind,
    choice: Choice = TWO,
    learning: Learning | None = LEARNING,
    leave_out=(),
    ranks=(4, 4, 4, 4),
):
    net = Net(KINDS[kind]).eval()
    experts = family(net, kind, ranks=ranks, leave_out=leave_out)
    mixture = mix(
        net,
        experts,
        gate=Router(choice=choice, spread=1.0),
        site="feedforward",
        blocks=BLOCKS,
        learning=learning,
    )
    return net, experts, mixture


def routers_of(mixture) -> Any:
    return [mixture.gate(f"blocks.{b}.mlp").weight for b in range(2)]


def x_of(seed=0, rows=2, positions=3):
    return torch.randn(rows, positions, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("choice", "route"), [(TopK(k=2), top_k(2)), (TopK(k=9), top_k(9)), (TopP(p=0.6), top_p(0.6))]
)
def test_output_and_every_gradient_are_the_loops(kind, choice, route):
    net, experts, mixture = mixed(kind, choice)
    leaves = {**dict(mixture.gates.named_parameters()), **mixture.parameters_of_experts()}
    x = x_of().requires_grad_()
    y = net(x)
    answer = torch.linspace(-1, 1, y.numel()).view(y.shape)
    found = torch.autograd.grad((y * answer).sum(), [x, *leaves.values()])

    plain = Net(KINDS[kind]).eval()
    twins = [
        Expert(
            one.name,
            {path: mixture.layers[path].part(place) for path in one.layers},
        )
        for place, one in enumerate(experts)
    ]
    expected = reference(plain, twins, routers_of(mixture), route, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(
        (expected * answer).sum(), [x, *leaves.values()], materialize_grads=True
    )
    for name, one, other in zip(["x", *leaves], found, wanted, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def one_expert(kind, place):
    """The base with one expert added to its weights."""
    net = Net(KINDS[kind]).eval()
    for path, factors in family(net, kind)[place].layers.items():
        net.get_submodule(path).weight += factors.delta()
    return net


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_expert_alone_is_a_merge(kind):
    net, _, mixture = mixed(kind)
    for place, name in enumerate(mixture.names):
        with mixture.pinned({name: 1.0}):
            torch.testing.assert_close(net(x_of()), one_expert(kind, place)(x_of()))
    with mixture.pinned(torch.eye(5)[[2, 4]]):
        expected = torch.cat([one_expert(kind, p)(x_of()[i : i + 1]) for i, p in ((0, 2), (1, 4))])
        torch.testing.assert_close(net(x_of()), expected)


@torch.no_grad()
def test_what_pinned_weights_lack_to_one_is_the_bases():
    net, experts, mixture = mixed("biased")
    plain = Net(KINDS["biased"]).eval()
    x, weights = x_of(), [0.3, 0.0, -0.2, 0.5]
    mlp = plain.blocks[0].mlp
    expected = 0.4 * mlp(x)
    for weight, expert in zip(weights, experts, strict=False):
        own = changed(mlp, "blocks.0.mlp", expert)
        expected = expected + weight * functional_call(mlp, own, (x,))
    seen = []
    net.blocks[0].mlp.register_forward_hook(lambda _m, _args, y: seen.append(y))
    net.blocks[0].attention = Still()
    with mixture.pinned(torch.tensor([*weights, 0.0])):
        net(x)
    torch.testing.assert_close(seen[0], expected)
    with mixture.pinned({}):
        torch.testing.assert_close(net(x), mixture_off(net, mixture, x))


class Still(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def mixture_off(net, mixture, x):
    with mixture.disabled():
        return net(x)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_disabled_and_unmixed_are_the_base(kind):
    net, _, mixture = mixed(kind)
    expected = Net(KINDS[kind]).eval()(x_of())
    assert not torch.allclose(net(x_of()), expected)
    with mixture.disabled():
        assert torch.equal(net(x_of()), expected)
    with mixture.scaled(0.0):
        torch.testing.assert_close(net(x_of()), expected)
    state = Net(KINDS[kind]).state_dict()
    assert mixture.base_state_dict().keys() == state.keys()
    mixture.unmix()
    assert net.state_dict().keys() == state.keys()
    assert torch.equal(net(x_of()), expected)


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize("left_out", ["first", "last"])
def test_layers_that_no_expert_changes(kind, left_out):
    names = FEED_FORWARD[kind]
    leave_out = names[:1] if left_out == "first" else names[-1:]
    net, experts, mixture = mixed(kind, leave_out=leave_out)
    plain = Net(KINDS[kind]).eval()
    expected = reference(plain, experts, routers_of(mixture), top_k(2), x_of())
    torch.testing.assert_close(net(x_of()), expected, rtol=1e-4, atol=1e-5)


def test_experts_of_several_ranks():
    net, experts, mixture = mixed("gated", ranks=(1, 5, 2, 3))
    plain = Net(KINDS["gated"]).eval()
    expected = reference(plain, experts, routers_of(mixture), top_k(2), x_of())
    torch.testing.assert_close(net(x_of()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_those_of_the_forward(kind):
    net, _, mixture = mixed(kind)
    leaves = [*mixture.gates.parameters(), *mixture.parameters_of_experts().values()]
    found = []
    for net.checkpointing in (False, True):
        first, second = net(x_of(1)), net(x_of(2, rows=3))
        loss = first.square().sum() + second.pow(3).sum()
        found.append(torch.autograd.grad(loss, leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 3),
    positions=st.integers(1, 4),
    k=st.integers(1, 5),
    seed=st.integers(0, 99),
    masked=st.lists(st.sampled_from(["e0", "e1", "e2", "e3"]), unique=True, max_size=3),
)
@torch.no_grad()
def test_masked_experts_are_as_if_there_were_none(rows, positions, k, seed, masked):
    net, experts, mixture = mixed("gated", TopK(k=k))
    x, plain = x_of(seed, rows, positions), Net(KINDS["gated"]).eval()

    def route(logits):
        kept = torch.tensor([f"e{i}" not in masked for i in range(4)])
        few = min(k, int(kept.sum()))
        return top_k(few)(logits.masked_fill(~kept, -torch.inf))

    with mixture.masked(masked):
        expected = reference(plain, experts, routers_of(mixture), route, x)
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_later_position_moves_no_earlier_one():
    net, _, _ = mixed("gated")
    x = x_of(positions=5)
    y = net(x)
    for end in range(1, 5):
        torch.testing.assert_close(net(x[:, :end]), y[:, :end])


def test_what_is_no_feed_forward_is_told():
    net = Net(Gated)
    attention = family(net, "gated")[-1:]
    with pytest.raises(ValueError, match="none of the layers that carry experts lies in a feed"):
        mix(net, attention, gate=Router(), site="feedforward", blocks=BLOCKS)
    with pytest.raises(ValueError, match="hand the model's blocks"):
        mix(net, family(net, "gated"), gate=Router(), site="feedforward")


def test_learning_experts_are_parameters_and_others_are_not():
    net, _, mixture = mixed("gated")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    gates = {f"mixture.gates.{name}" for name, _ in mixture.gates.named_parameters()}
    assert trained == gates | set(mixture.parameters_of_experts())
    pairs = len(mixture.layers)
    assert len(mixture.parameters_of_experts()) == 2 * pairs
    state = net.state_dict()
    assert set(mixture.parameters_of_experts()) <= set(state)
    other, _, twin = mixed("gated")
    with torch.no_grad():
        for parameter in twin.parameters_of_experts().values():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x_of()), net(x_of()))
    assert twin.digests == mixture.digests
    mixture.unmix()
    assert all(p.requires_grad for p in net.parameters())
    frozen = mixed("gated", learning=None)[2]
    assert not frozen.parameters_of_experts()


def test_dropout_in_training_alone():
    net, _, mixture = mixed("gated", learning=Learning(dropout=0.5))
    expected = net(x_of())
    assert torch.equal(net(x_of()), expected)
    mixture.train()
    assert not net.blocks[0].training
    assert not torch.allclose(net(x_of()), expected)
    mixture.eval()
    assert torch.equal(net(x_of()), expected)


def test_jitter_in_training_alone():
    net = Net(Gated).eval()
    gate = Router(jitter=0.5, spread=1.0)
    mixture = mix(net, family(net, "gated"), gate=gate, site="feedforward", blocks=BLOCKS)
    expected = net(x_of())
    assert torch.equal(net(x_of()), expected)
    mixture.train()
    assert not torch.allclose(net(x_of()), expected)


def test_a_switch_drops_what_comes_too_late():
    net, experts, mixture = mixed("gated", Switch(capacity=1))
    plain = Net(Gated).eval()
    x, real = x_of(positions=9), torch.tensor([[False] + [True] * 8, [True] * 9])
    mlp = plain.blocks[0].mlp
    expected, router = [], routers_of(mixture)[0]
    for row, counted in zip(x, real, strict=True):
        seen = set()
        for v, one in zip(row, counted, strict=True):
            share, expert = (router @ v).softmax(0).max(0)
            late = bool(one) and int(expert) in seen
            seen |= {int(expert)} if one else set()
            own = changed(mlp, "blocks.0.mlp", experts[int(expert)])
            y = mlp(v) if late else share * functional_call(mlp, own, (v[None],))[0]
            expected.append(y)
    found = []
    net.blocks[0].mlp.register_forward_hook(lambda _m, _args, y: found.append(y))
    net.blocks[0].attention = Still()
    mixture.train()
    with mixture.condition(real=real):
        net(x)
    torch.testing.assert_close(found[0].flatten(0, 1), torch.stack(expected))
    mixture.eval()
    net(x)
    assert not torch.allclose(found[1], found[0])


@torch.no_grad()
def test_one_expert_is_baked_and_several_are_not():
    net, _, mixture = mixed("gated", learning=None)
    with pytest.raises(ValueError, match="each run the whole feed-forward"):
        mixture.bake({"e0": 0.5, "e1": 0.5})
    mixture.bake({"e2": 1.0, "attention": 0.5})
    found = net(x_of())
    mixture.unmix()
    net, _, mixture = mixed("gated")
    with mixture.pinned({"e2": 1.0, "attention": 0.5}):
        torch.testing.assert_close(net(x_of()), found)


def test_constant_gates_over_feed_forwards():
    net = Net(Gated).eval()
    experts = family(net, "gated")[:1]
    mix(net, experts, gate=Sum(), site="feedforward", blocks=BLOCKS)
    with torch.no_grad():
        torch.testing.assert_close(net(x_of()), one_expert_of(experts[0])(x_of()))


@torch.no_grad()
def one_expert_of(expert):
    net = Net(Gated).eval()
    for path, factors in expert.layers.items():
        net.get_submodule(path).weight += factors.delta()
    return net
