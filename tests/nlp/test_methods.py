"""MixLoRA and MoLA on a tiny LLaMA, against plain loops over positions and experts."""

import copy
import math
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mole_vl.gates import Switch, TopK, TopP
from mole_vl.layers import is_transposed
from mole_vl.lora import LoRA
from mole_vl.losses import load_balance, z_loss
from mole_vl.mixlora import Form, MixLoRA
from mole_vl.mola import MoLA, experts_by_layer
from nlp.adapter import blocks
from tests.nlp.families import CAUSAL, causal
from tests.nlp.toys import tiny_model
from tests.toys import randomise

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MIXLORA = MixLoRA(
    experts=4, choice=TopK(k=2), form=Form(rank=4, alpha=8), dropout=0.0, spread=1.0, balance=0.5
)
EXPERTS, TOP_K, RANK = (2, 4), (1, 3), (2, 4)
MOLA = MoLA(experts=EXPERTS, top_k=TOP_K, rank=RANK, alpha=8, dropout=0.0, balance=0.5)


class Loop(nn.Module):
    """`W x` and the weighed updates of the experts, one position and one expert at a time."""

    def __init__(self, base, pairs, scale, router=None, k=1):
        super().__init__()
        self.base, self.scale, self.k = base, scale, k
        self.a = nn.ParameterList([nn.Parameter(a) for a, _ in pairs])
        self.b = nn.ParameterList([nn.Parameter(b) for _, b in pairs])
        self.router = None if router is None else nn.Parameter(router)
        self.seen: list = []

    def update(self, expert, v):
        return self.scale * (self.b[expert] @ (self.a[expert] @ v))

    def forward(self, x):
        y = self.base(x)
        rows = []
        for row in x:
            out = []
            for v in row:
                if self.router is None:
                    out.append(self.update(0, v))
                    continue
                shares = (self.router @ v).softmax(0)
                best = sorted(range(len(shares)), key=lambda e, s=shares: -s[e].item())[: self.k]
                self.seen.append((shares, best))
                whole = sum(shares[e] for e in best)
                out.append(sum(shares[e] / whole * self.update(e, v) for e in best))
            rows.append(torch.stack(out))
        return y + torch.stack(rows)


class LoopMLP(nn.Module):
    """The whole feed-forward of each of a position's experts."""

    def __init__(self, mlp, loops, router, k):
        super().__init__()
        self.act = mlp.act_fn
        self.gate, self.up, self.down = loops
        self.router, self.k = nn.Parameter(router), k
        self.seen: list = []

    def one(self, expert, v):
        def changed(loop, u):
            return loop.base(u) + loop.update(expert, u)

        return changed(self.down, self.act(changed(self.gate, v)) * changed(self.up, v))

    def forward(self, x):
        rows = []
        for row in x:
            out = []
            for v in row:
                shares = (self.router @ v).softmax(0)
                best = sorted(range(len(shares)), key=lambda e, s=shares: -s[e].item())[: self.k]
                self.seen.append((shares, best))
                whole = sum(shares[e] for e in best)
                out.append(sum(shares[e] / whole * self.one(e, v) for e in best))
            rows.append(torch.stack(out))
        return torch.stack(rows)


def pairs_of(layer):
    start, found = 0, []
    for rank in layer.ranks:
        own = slice(start, start + rank)
        if rank:
            found.append((layer.a[own].detach().clone(), layer.b[:, own].detach().clone()))
        start += rank
    return found


def loops_of_mixlora(mixture) -> Any:
    """A copy of the base under loops."""
    model = tiny_model()
    for number, block in enumerate(model.model.layers):
        at = f"model.layers.{number}"
        for name in ATTENTION:
            layer = mixture.layers[f"{at}.self_attn.{name}"]
            loop = Loop(getattr(block.self_attn, name), pairs_of(layer), 2.0)
            setattr(block.self_attn, name, loop)
        loops = [
            Loop(getattr(block.mlp, name), pairs_of(mixture.layers[f"{at}.mlp.{name}"]), 2.0)
            for name in MLP
        ]
        router = mixture.gate(f"{at}.mlp").weight.detach().clone()
        block.mlp = LoopMLP(block.mlp, loops, router, 2)
    return model


def loops_of_mola(mixture) -> Any:
    model = tiny_model()
    for number, block in enumerate(model.model.layers):
        for part, names in (("self_attn", ATTENTION), ("mlp", MLP)):
            for name in names:
                path = f"model.layers.{number}.{part}.{name}"
                owner = getattr(block, part)
                router = mixture.gate(path).weight.detach().clone()
                loop = Loop(
                    getattr(owner, name),
                    pairs_of(mixture.layers[path]),
                    8 / RANK[number],
                    router,
                    TOP_K[number],
                )
                setattr(owner, name, loop)
    return model


IDS = torch.tensor([[5, 9, 2, 7], [0, 0, 3, 4]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def batch():
    places = (MASK.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": IDS, "attention_mask": MASK, "position_ids": places, "use_cache": False}


def lively(method):
    model = tiny_model()
    mixture = method.mix(model, blocks=blocks(model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in mixture.parameters_of_experts().items():
            if ".ups." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model, mixture


def real_of(seen):
    """What a router saw of real positions."""
    return [one for one, real in zip(seen, MASK.flatten().tolist(), strict=True) if real]


def even(seen, experts, by_choice):
    """`E sum_e f_e P_e` of (shares, chosen) by position."""
    shares = torch.stack([one for one, _ in seen]).mean(0)
    picks = torch.zeros(experts)
    for _, best in seen:
        picks[best] += 1
    return experts * (picks / (picks.sum() if by_choice else len(seen)) * shares).sum()


def scored(model):
    logits = model(**batch()).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")[
        MASK[:, 1:].flatten().bool()
    ].mean()


def compared(method, loops, aux, training) -> Any:
    """Loss and gradients of a mixture and of its loops, by parameter."""
    model, mixture = lively(method)
    plain = loops(mixture)
    mixture.train(training)
    with mixture.condition(real=MASK.bool()), mixture.record() as records:
        loss = scored(model)
    terms = method.losses(records, blocks(model))
    loss = loss + sum(value * weight for value, weight in terms.values())
    expected = scored(plain)
    expected = expected + 0.5 * aux(plain)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    return mixture, plain


def held(loops, layer):
    """Gradients of a layer's stacked factors, from its loop."""
    # The loop never touches an expert that nobody chose.
    grads = [
        [torch.zeros_like(p) if p.grad is None else p.grad for p in x] for x in (loops.a, loops.b)
    ]
    a, b = torch.cat(grads[0]), torch.cat(grads[1], 1)
    found = [layer.get_parameter(f"stack.{name}.0").grad for name in ("downs", "ups")]
    torch.testing.assert_close(found, [a, b.T], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("balanced", ["model", "layer"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_mixlora_is_its_loop(training, balanced):
    def aux(plain):
        seen = [real_of(block.mlp.seen) for block in plain.model.layers]
        seen = [list(chain(*seen))] if balanced == "model" else seen
        return sum(even(one, 4, by_choice=False) for one in seen)

    method = replace(MIXLORA, balanced=balanced)
    mixture, plain = compared(method, loops_of_mixlora, aux, training)
    for number, block in enumerate(plain.model.layers):
        at = f"model.layers.{number}"
        for name in ATTENTION:
            loop = getattr(block.self_attn, name)
            held(loop, mixture.layers[f"{at}.self_attn.{name}"])
        for name, loop in zip(MLP, (block.mlp.gate, block.mlp.up, block.mlp.down), strict=True):
            held(loop, mixture.layers[f"{at}.mlp.{name}"])
        router = mixture.gate(f"{at}.mlp").weight
        torch.testing.assert_close(router.grad, block.mlp.router.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("balanced", ["layer", "router"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_mola_is_its_loop_with_other_experts_in_each_layer(training, balanced):
    def loops(block):
        return [getattr(block.self_attn, n) for n in ATTENTION] + [
            getattr(block.mlp, n) for n in MLP
        ]

    def aux(plain):
        total = 0
        for block, experts in zip(plain.model.layers, EXPERTS, strict=True):
            seen = [real_of(loop.seen) for loop in loops(block)]
            groups = [list(chain(*seen))] if balanced == "layer" else seen
            total = total + sum(even(group, experts, by_choice=True) for group in groups)
        return total

    method = replace(MOLA, balanced=balanced)
    mixture, plain = compared(method, loops_of_mola, aux, training)
    for number, block in enumerate(plain.model.layers):
        names = [f"self_attn.{n}" for n in ATTENTION] + [f"mlp.{n}" for n in MLP]
        for name, loop in zip(names, loops(block), strict=True):
            path = f"model.layers.{number}.{name}"
            held(loop, mixture.layers[path])
            found = mixture.gate(path).weight.grad
            torch.testing.assert_close(found, loop.router.grad, rtol=1e-3, atol=1e-5)


FAMILIES = [name for name in CAUSAL if "moe" not in name and name != "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_mixlora_finds_the_feed_forward_of_every_family(family):
    model = causal(family)
    expected = model(input_ids=IDS, attention_mask=MASK).logits
    found = blocks(model)
    mixture = MIXLORA.mix(model, blocks=found)
    own = [site for site in mixture.layout.sites if site.feedforward is not None]
    assert [site.name.rpartition(".")[0] for site in own] == list(found)
    torch.testing.assert_close(
        model(input_ids=IDS, attention_mask=MASK).logits, expected, rtol=1e-4, atol=1e-5
    )
    randomise(mixture, size=1.0)
    with torch.no_grad():
        for parameter in mixture.parameters_of_experts().values():
            parameter.normal_(0, 0.3)
    y = model(input_ids=IDS[:1]).logits
    assert not torch.allclose(y, expected[:1])
    torch.testing.assert_close(model(input_ids=IDS[:1, :2]).logits, y[:, :2], rtol=1e-4, atol=1e-5)
    for expert in range(2):
        with mixture.pinned({f"expert{expert}": 1.0, "shared": 1.0}):
            one = model(input_ids=IDS[:1]).logits
        plain = causal(family)
        with torch.no_grad():
            for name in (f"expert{expert}", "shared"):
                place = mixture.names.index(name)
                for path, factors in mixture.experts()[place].layers.items():
                    layer = plain.get_submodule(path)
                    delta = factors.delta()
                    layer.get_parameter("weight").add_(delta.T if is_transposed(layer) else delta)
        torch.testing.assert_close(one, plain(input_ids=IDS[:1]).logits, rtol=1e-3, atol=1e-4)


def test_a_base_without_feed_forward_modules_is_told():
    model = causal("mixtral")
    with pytest.raises(ValueError, match="none of the targets lies in a feed-forward"):
        MixLoRA().mix(model, blocks=blocks(model))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("rectangle", (5,) * 8),
        ("triangle", (8, 8, 6, 6, 4, 4, 2, 2)),
        ("inverted_triangle", (2, 2, 4, 4, 6, 6, 8, 8)),
        ("hourglass", (8, 8, 2, 2, 2, 2, 8, 8)),
    ],
)
def test_shapes_are_the_papers(shape, expected):
    assert experts_by_layer(shape, 8) == expected
    assert experts_by_layer(shape, 32)[::4] == expected
    assert sum(experts_by_layer(shape, 4)) == 20


def test_an_untrained_method_changes_nothing():
    expected = tiny_model()(**batch()).logits
    for method in (MIXLORA, MOLA, MixLoRA(choice=TopP(p=0.5)), MoLA(experts=3)):
        model = tiny_model()
        method.mix(model, blocks=blocks(model))
        torch.testing.assert_close(model(**batch()).logits, expected)


def test_evaluation_is_deterministic_and_training_is_not():
    method = MixLoRA(experts=4, form=Form(rank=4, alpha=8), dropout=0.3, jitter=0.3)
    model, mixture = lively(method)
    expected = model(**batch()).logits
    assert torch.equal(model(**batch()).logits, expected)
    model.train()
    assert not torch.allclose(model(**batch()).logits, expected)
    model.eval()
    assert torch.equal(model(**batch()).logits, expected)
    assert not mixture.training


@pytest.mark.parametrize("method", [MIXLORA, MOLA])
def test_a_state_dict_holds_every_expert_and_router(method):
    model, mixture = lively(method)
    expected = model(**batch()).logits
    state = copy.deepcopy(model.state_dict())
    other = tiny_model()
    twin = method.mix(other, blocks=blocks(other))
    assert not torch.allclose(other(**batch()).logits, expected)
    other.load_state_dict(state)
    assert torch.equal(other(**batch()).logits, expected)
    assert [one.digest for one in twin.experts()] == [one.digest for one in mixture.experts()]
    assert mixture.base_state_dict().keys() == tiny_model().state_dict().keys()


def test_even_routers_have_the_least_balance():
    model, mixture = lively(MIXLORA)
    with torch.no_grad():
        for gate in mixture.gates.parameters():
            gate.zero_()
    with mixture.record() as records:
        model(**batch())
    # Equal scores choose the first two; the shares are equal all the same.
    assert load_balance(records).item() == pytest.approx(2.0)
    assert z_loss(records).item() == pytest.approx(math.log(4) ** 2)
    assert load_balance(records, by_choice=True).item() == pytest.approx(1.0)
    constant = [record for record in records if record.output.experts is None]
    assert len(constant) == 1
    with pytest.raises(ValueError, match="no router's result"):
        load_balance(constant)


@pytest.mark.parametrize("choice", [TopP(p=0.6), Switch(capacity=1)])
def test_every_choice_learns(choice):
    method = MixLoRA(experts=4, form=Form(rank=4), choice=choice, dropout=0.0, spread=0.5, z=0.1)
    model, mixture = lively(method)
    mixture.train()
    with mixture.record() as records:
        loss = scored(model)
    terms = method.losses(records, blocks(model))
    assert set(terms) == {"balance", "z"}
    (loss + sum(value * weight for value, weight in terms.values())).backward()
    moved = [p.grad.abs().sum() for p in mixture.gates.parameters() if p.grad is not None]
    assert len(moved) == 2 and all(moved)


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda m: MoLA(experts=(2, 4, 6)).mix(m, blocks=blocks(m)), "experts has 3 numbers, and"),
        (lambda m: MoLA(targets=("w1",)).mix(m, blocks=blocks(m)), "'w1' names no layer"),
        (lambda m: MoLA(targets=("lm_head",)).mix(m, blocks=blocks(m)), "lm_head lies in no block"),
        (lambda m: MixLoRA(targets=ATTENTION).mix(m, blocks=blocks(m)), "none of the targets"),
        (lambda m: MixLoRA(experts=0), "experts is 0, expected at least 1"),
        (lambda m: MoLA(experts="square"), "experts is 'square', expected one of rectangle"),  # pyright: ignore
        (lambda m: MoLA(top_k=(2, 0)), "top_k is 0"),
        (lambda m: MixLoRA(targets=()), "targets is empty"),
    ],
)
def test_what_cannot_be_is_told(made, match):
    with pytest.raises(ValueError, match=match):
        made(tiny_model())


@pytest.mark.parametrize("made", [MixLoRA(), MoLA(experts=2), LoRA()])
def test_a_mixed_model_is_not_mixed_again(made):
    model = tiny_model()
    mixture = made.mix(model, blocks=blocks(model))
    with pytest.raises(RuntimeError, match=r"mixed already: call model\.mixture\.unmix\(\) first"):
        made.mix(model, blocks=blocks(model))
    mixture.unmix()
    made.mix(model, blocks=blocks(model))
