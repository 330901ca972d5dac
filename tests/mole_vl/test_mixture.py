import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mole_vl import Expert, Factors, mix
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
from tests.toys import BLOCKS, SITES, Toy, expert, inputs, randomise, three

SCORES = [Hidden(), Responses(), Free()]
NORMALISERS = [Softmax(), ScaledSoftmax(), Sigmoid()]


def with_constant_weights(model: Toy, experts: list[Expert], weights: dict[str, float], x, context):
    """The plain loop: Delta-W of every expert added to the base's weights."""
    changed = {name: p.detach().clone() for name, p in model.named_parameters()}
    for one in experts:
        for path, factors in one.layers.items():
            changed[f"{path}.weight"] += weights[one.name] * factors.delta()
    return functional_call(model, changed, (x, context))


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
            features = torch.nn.functional.normalize(source, dim=-1) * source.shape[-1] ** 0.5
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


@pytest.mark.parametrize(
    ("normaliser", "kept_weight"),
    [(Softmax(), 1 / 2), (ScaledSoftmax(), 1.0), (ScaledSoftmax(total=1.5), 0.5), (Sigmoid(), 1.0)],
)
def test_masks_at_zero_score(normaliser, kept_weight):
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(normaliser=normaliser), blocks=BLOCKS)
    with mixture.masked(["bob"]), mixture.record() as records:
        model(*inputs())
    for record in records:
        expected = torch.tensor([kept_weight, 0.0, kept_weight]).expand(3, 3)
        torch.testing.assert_close(record.output.weights, expected)


def test_masks_renormalise_trained_softmax_and_leave_sigmoid_alone():
    for normaliser in (Softmax(), Sigmoid()):
        model = Toy()
        mixture = mix(
            model, three(model), gate=MoLE(score=Free(), normaliser=normaliser), blocks=BLOCKS
        )
        randomise(mixture)
        with mixture.record() as whole:
            model(*inputs())
        with mixture.masked(["ann"]), mixture.record() as part:
            model(*inputs())
        for before, after in zip(whole, part, strict=True):
            kept = before.output.weights.clone()
            kept[0] = 0
            if isinstance(normaliser, Softmax):
                kept = kept / kept.sum()
            torch.testing.assert_close(after.output.weights, kept)


def test_pinned_weights_by_name_by_row_and_by_site():
    model = Toy()
    experts = three(model)
    x, context = inputs(rows=2)
    alone = [
        with_constant_weights(
            model, experts, {n: float(n == name) for n in ("ann", "bob", "cyd")}, x, context
        )
        for name in ("ann", "cyd")
    ]
    mixture = mix(model, experts, gate=MoLE(), blocks=BLOCKS)
    with mixture.pinned({"ann": 1.0}):
        torch.testing.assert_close(model(x, context), alone[0])
    with mixture.pinned(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])):
        rows = model(x, context)
    torch.testing.assert_close(rows[0], alone[0][0])
    torch.testing.assert_close(rows[1], alone[1][1])
    with mixture.pinned({"blocks.0": {"ann": 0.5}}), mixture.record() as records:
        model(x, context)
    by_site = {record.site: record.output.weights for record in records}
    torch.testing.assert_close(by_site["blocks.0"], torch.tensor([0.5, 0.0, 0.0]))
    torch.testing.assert_close(by_site["blocks.1"], torch.full((2, 3), 1 / 3))


def test_strength_scales_the_whole_update():
    model = Toy()
    experts = three(model)
    x, context = inputs()
    expected = with_constant_weights(
        model, experts, dict.fromkeys(["ann", "bob", "cyd"], 0.25), x, context
    )
    mixture = mix(model, experts, gate=Sum(), site="matrix")
    for strength in (0.25, torch.tensor(0.25)):
        with mixture.scaled(strength):
            torch.testing.assert_close(model(x, context), expected)


def test_rows_take_the_result_of_the_row_they_are_told_of():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    randomise(mixture)
    x, context = inputs(rows=4)
    with mixture.record() as own, torch.no_grad():
        model(x, context)
    with (
        mixture.condition(source=torch.tensor([2, 3, 2, 3])),
        mixture.record() as shared,
        torch.no_grad(),
    ):
        model(x, context)
    first_own, first_shared = own[0].output.weights, shared[0].output.weights
    torch.testing.assert_close(first_shared, first_own[[2, 3, 2, 3]])


def test_held_results_serve_later_forwards_and_spread_over_beams():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    randomise(mixture)
    x, context = inputs(rows=2)
    later = inputs(rows=4, positions=1, seed=5)
    pool = torch.tensor([[True, True, False, False], [True, True, True, False]])
    with mixture.condition(pool=pool, hold=True), mixture.record() as records:
        model(x.repeat_interleave(2, 0), context.repeat_interleave(2, 0))
        model(*later)
    first, second = records[0].output.weights, records[2].output.weights
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1])
    h = torch.nn.functional.normalize(model.inlet(x), dim=-1)
    expected = mixture.gate("blocks.0").score(torch.stack([h[0, :2].mean(0), h[1, :3].mean(0)]), ())
    torch.testing.assert_close(records[0].output.logits[[0, 2]], expected)


def test_contexts_end_with_their_block_even_on_an_error():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    expected = model(*inputs())
    with pytest.raises(KeyError), mixture.masked(["ann"]), mixture.scaled(3.0):
        raise KeyError
    assert torch.equal(model(*inputs()), expected)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(1, 4, 2), torch.zeros(1, 2, 5))
    assert torch.equal(model(*inputs()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: [], "at least one expert"),
        (lambda e: [e[0], e[0]], "share the names ann"),
        (
            lambda e: [Expert("eve", {"nowhere.q": e[0].layers["blocks.0.attention.q"]})],
            "'eve' from memory matches no layer",
        ),
        (
            lambda e: [
                Expert("eve", {**e[0].layers, "nowhere.q": e[0].layers["blocks.0.attention.q"]})
            ],
            "1 layers that this model lacks: nowhere.q",
        ),
        (
            lambda e: [Expert("eve", {"blocks.0.ff.0": e[0].layers["blocks.0.attention.q"]})],
            r"expected \(12, 6\)",
        ),
    ],
)
def test_experts_that_do_not_fit_are_named_and_change_nothing(change, message):
    model = Toy()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        mix(model, change(three(model)), gate=MoLE(), blocks=BLOCKS)
    assert str(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_factors_with_nan_are_refused():
    with pytest.raises(ValueError, match="factor b of q holds NaN"):
        Expert("eve", {"q": Factors(torch.ones(1, 2), torch.tensor([[float("nan")]]), 1.0)})


def test_mistakes_in_the_use_of_a_handle_are_sentences():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    with pytest.raises(RuntimeError, match="mixed already"):
        mix(model, three(Toy()), gate=MoLE(), blocks=BLOCKS)
    with pytest.raises(ValueError, match="unknown expert 'zoe': the mixture has ann, bob, cyd"):
        mixture.masked(["zoe"])
    with pytest.raises(ValueError, match="no expert is left"):
        mixture.masked(["ann", "bob", "cyd"])
    with pytest.raises(ValueError, match="expected 3 at the end"):
        mixture.pinned(torch.ones(2))
    with pytest.raises(ValueError, match="these gates read their input"):
        mixture.bake()
    with pytest.raises(RuntimeError, match="ran outside of a forward of the mixed model"):
        model.blocks[0](torch.zeros(1, 4, 6), torch.zeros(1, 2, 5))
    with pytest.raises(
        ValueError, match="weights are given for ann; the experts are ann, bob, cyd"
    ):
        mix(Toy(), three(Toy()), gate=Constants(weights={"ann": 1.0}), site="matrix")
    mixture.unmix()
    with pytest.raises(RuntimeError, match="was unmixed"):
        mixture.unmix()


def test_responses_need_a_layer_that_reads_the_site():
    model = Toy()
    before = str(model)
    lone = expert("eve", model, ["blocks.0.ff.2"], [2])
    with pytest.raises(ValueError, match="no response to read; use Hidden"):
        mix(model, [lone], gate=MoLE(score=Responses()), blocks=BLOCKS)
    assert str(model) == before


def test_weights_by_position_cannot_reach_another_sequence():
    model = Toy()
    mix(model, three(model), gate=MoLE(over="position"), blocks=BLOCKS)
    with pytest.raises(
        ValueError, match=r"attention.k: its gate's weights vary over rows and positions"
    ):
        model(*inputs())


@pytest.mark.parametrize("score", [Hidden(), Responses()])
def test_scores_are_fp32_under_autocast(score):
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(score=score), blocks=BLOCKS)
    randomise(mixture)
    x = torch.randn(2, 4, 6)
    gate, readers = mixture.gate("blocks.0"), mixture._dispatch.readers["blocks.0"]
    expected = gate(GateInput(x), readers).logits
    with mixture.record() as records, torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs())
        mixed = mixture._dispatch._result("blocks.0", x, Pass(Conditions(), {}, 0, grad=True))
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
    before = {path: layer.scales.clone() for path, layer in mixture._layers.items()}
    model.to(torch.bfloat16).float()
    assert all(torch.equal(layer.scales, before[path]) for path, layer in mixture._layers.items())
    assert mixture.gate("blocks.0.ff.0").values.tolist() == torch.full((3,), 1 / 3).tolist()


def test_contexts_combine():
    model = Toy()
    mixture = mix(model, three(model), gate=Sum(), site="network", blocks=BLOCKS)
    with (
        mixture.record() as outer,
        mixture.masked("ann"),
        mixture.masked("bob"),
        mixture.record() as inner,
    ):
        model(*inputs())
    assert inner[0].output.weights.tolist() == [0.0, 0.0, 1.0]
    assert len(outer) == len(inner) == 1
    expected = with_constant_weights_of(mixture, model, 0.25)
    with mixture.scaled(0.5), mixture.scaled(0.5):
        torch.testing.assert_close(model(*inputs()), expected)
    with mixture.masked(["ann", "bob"]), pytest.raises(ValueError, match="no expert is left"):
        mixture.masked(["cyd"])


def with_constant_weights_of(mixture, model, weight):
    with mixture.pinned([weight] * 3):
        return model(*inputs())


def test_a_pin_is_not_held_beyond_its_context():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    with mixture.condition(hold=True), mixture.record() as records:
        with mixture.pinned({"ann": 5.0}):
            model(*inputs())
        model(*inputs())
    torch.testing.assert_close(records[-1].output.weights, torch.full((3, 3), 1 / 3))


def test_a_copy_made_inside_a_context_is_free_of_it():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    expected = model(*inputs())
    with mixture.disabled(), mixture.record():
        twin = copy.deepcopy(model)
    assert torch.equal(twin(*inputs()), expected)


def test_a_baked_mixture_says_that_it_hears_no_more():
    model = Toy()
    mixture = mix(model, three(model), gate=Sum(), site="matrix")
    mixture.bake()
    for context in (mixture.disabled, lambda: mixture.masked(["ann"]), mixture.record):
        with (
            pytest.raises(RuntimeError, match=r"baked into the base: call unmix\(\) first"),
            context(),
        ):
            pass
    with pytest.raises(RuntimeError, match="baked already"):
        mixture.bake()


def test_a_weight_shared_with_another_module_is_not_baked():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    model = Tied()
    mixture = mix(model, [expert("eve", model, ["head"], [2])], gate=Sum(), site="matrix")
    before = model.embedding.weight.clone()
    with pytest.raises(ValueError, match=r"shares its weight .*embedding.weight"):
        mixture.bake()
    assert torch.equal(model.embedding.weight, before)


def test_layers_that_are_read_past_their_forward_take_no_expert():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    factors = Factors(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    with pytest.raises(ValueError, match="matches no layer"):
        mix(model, [Expert("eve", {"attention.out_proj": factors})], gate=Sum(), site="matrix")


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


def test_methods_that_read_weights_past_the_forward_are_refused_until_unmixed():
    class Fusing(Toy):
        def fuse_qkv_projections(self):
            return "fused"

    model = Fusing()
    mixture = mix(model, three(model), gate=MoLE(), blocks=BLOCKS)
    with pytest.raises(RuntimeError, match=r"fuse_qkv_projections\(\) on a mixed model"):
        model.fuse_qkv_projections()
    mixture.unmix()
    assert model.fuse_qkv_projections() == "fused"
