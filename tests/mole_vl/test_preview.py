"""Gates that find their weights in a preview: the model runs up to the block that they read."""

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch.nn.functional import normalize

from mole_vl import mix, mix_from, save_gates
from mole_vl.gates import Average, Free, Hidden, MoLE
from tests.toys import BLOCKS, Toy, expert, inputs, randomise, three


def previewed(after=1, over="row", **settings):
    model = Toy()
    gate = MoLE(over=over, **settings)
    mixture = mix(model, three(model), gate=gate, site="preview", after=after, blocks=BLOCKS)
    randomise(mixture)
    return model, mixture


def by_hand(mixture, x, pool=None):
    """The weights that the gate finds in (rows, positions, 6)."""
    units = normalize(x, dim=-1)
    share = torch.ones(x.shape[:2]) if pool is None else pool.float()
    mean = (units * share[..., None]).sum(1) / share.sum(1, keepdim=True)
    gate = mixture.gate("network")
    features = normalize(normalize(mean, dim=-1) * 6**0.5 - gate.score.centre, dim=-1) * 6**0.5
    return gate.normaliser(features @ gate.score.weight.T + gate.score.bias)


def seen_by_base(model, block):
    seen = []
    hook = model.blocks[block].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with model.mixture.disabled():
        model(*inputs())
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("after", [0, 1])
def test_all_blocks_take_the_weights_that_the_gate_finds_in_the_bases_states(after):
    model, mixture = previewed(after)
    pool = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    expected = by_hand(mixture, seen_by_base(model, after), pool)
    with mixture.pinned(expected.detach()):
        reference = model(*inputs())
    with mixture.condition(pool=pool, hold=True), mixture.record() as records:
        mixture.preview(*inputs())
        found = model(*inputs())
        again = model(*inputs())
    torch.testing.assert_close(found, reference)
    torch.testing.assert_close(again, reference)
    assert [record.site for record in records] == ["network", "network"]
    torch.testing.assert_close(records[0].output.weights, expected)


def seen_under_average(model, block, kept=("ann", "bob", "cyd")):
    """The block's input in a whole forward whose weights are pinned to those experts' average."""
    seen = []
    hook = model.blocks[block].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad(), model.mixture.pinned(dict.fromkeys(kept, 1 / len(kept))):
        model(*inputs())
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kept", [("ann", "bob", "cyd"), ("ann", "cyd")])
@pytest.mark.parametrize("strength", [1.0, torch.tensor(0.5)])
def test_a_gate_may_be_shown_the_experts_average(kept, strength):
    model, mixture = previewed(preview="average")
    with mixture.scaled(strength):
        shown = seen_under_average(model, 1, kept)
    asked = mixture.masked([name for name in mixture.names if name not in kept])
    with ExitStack() as stack:
        stack.enter_context(asked)
        stack.enter_context(mixture.scaled(strength))
        stack.enter_context(mixture.condition(hold=True))
        records = stack.enter_context(mixture.record())
        mixture.preview(*inputs())
        model(*inputs())
    logits = mixture.gate("network").score(shown_mean(shown), ())
    torch.testing.assert_close(records[0].output.logits, logits)
    assert not torch.allclose(shown, seen_by_base(model, 1))


def shown_mean(x):
    return normalize(x, dim=-1).mean(1)


def test_a_gate_may_read_the_largest_and_the_last_position_beside_the_mean():
    model, mixture = previewed(score=Hidden(pool=("mean", "max", "last")))
    torch.nn.init.normal_(mixture.gate("network").score.centre)
    pool = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]]).bool()
    x = seen_by_base(model, 1)
    gate = mixture.gate("network")
    logits = []
    for row, mask in zip(x, pool, strict=True):
        units = normalize(row[mask], dim=-1)
        parts = [units.mean(0), units.amax(0), row[mask][-1]]
        centred = [
            normalize(normalize(part, dim=0) * 6**0.5 - centre, dim=0) * 6**0.5
            for part, centre in zip(parts, gate.score.centre.split(6), strict=True)
        ]
        logits.append(gate.score.weight @ torch.cat(centred) + gate.score.bias)
    with mixture.condition(pool=pool, hold=True), mixture.record() as records:
        mixture.preview(*inputs())
        model(*inputs())
    torch.testing.assert_close(records[0].output.logits, torch.stack(logits))


def test_settings_of_a_preview_that_nothing_would_read_are_refused():
    model = Toy()
    for site in ("block", "network", "matrix"):
        with pytest.raises(ValueError, match="which is for site 'preview'"):
            mix(model, three(model), gate=MoLE(preview="average"), site=site, blocks=BLOCKS)
    for gate, after, told in (
        (MoLE(score=Free(), preview="average"), 1, "the gate reads nothing"),
        (MoLE(preview="average"), 0, "with after 0 the gate reads before any expert speaks"),
    ):
        inside = [one for one in three(model) if all("blocks" in path for path in one.layers)]
        with pytest.raises(ValueError, match=told):
            mix(model, inside, gate=gate, site="preview", after=after, blocks=BLOCKS)
    slots = {"one": ["ann", "bob"], "other": ["cyd"]}
    how = {"gate": MoLE(preview="average"), "site": "preview", "blocks": BLOCKS, "slots": slots}
    with pytest.raises(ValueError, match="slots have no average"):
        mix(model, three(model), **how)
    with pytest.raises(ValueError, match="for over='row'"):
        MoLE(score=Hidden(pool=("mean", "max", "last")), over="position")
    with pytest.raises(ValueError, match="pool is 'least', expected"):
        Hidden(pool=("mean", "least"))
    with pytest.raises(ValueError, match="pool is empty, expected"):
        Hidden(pool=())
    with pytest.raises(ValueError, match="pool names a part twice: last, last"):
        Hidden(pool=("last", "last"))
    for pool in ("mean", None):
        with pytest.raises(ValueError, match="expected a list of mean, max, last"):
            Hidden(pool=pool)
    with pytest.raises(ValueError, match="preview is 'sum', expected"):
        MoLE(preview="sum")


def test_the_preview_runs_no_block_past_the_gate_and_leaves_no_graph():
    model, mixture = previewed()
    ran = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _m, _a, out, index=index: ran.append((index, out)))
    with mixture.condition(hold=True):
        mixture.preview(*inputs())
    assert [index for index, _ in ran] == [0]
    assert not ran[0][1].requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gates_gradient_is_that_of_the_weights_they_set(checkpointing):
    model, mixture = previewed()
    model.checkpointing = checkpointing
    weights = by_hand(mixture, seen_by_base(model, 1).detach())
    leaf = weights.detach().requires_grad_()
    with mixture.pinned(leaf):
        model(*inputs()).square().mean().backward()
    expected = torch.autograd.grad(weights, list(mixture.gates.parameters()), leaf.grad)
    with mixture.condition(hold=True):
        mixture.preview(*inputs())
        model(*inputs()).square().mean().backward()
    found = [parameter.grad for parameter in mixture.gates.parameters()]
    torch.testing.assert_close(found, list(expected))
    assert all(grad.abs().sum() > 0 for grad in found)


def test_masks_hold_in_the_preview_and_pins_and_the_base_need_none():
    model, mixture = previewed()
    with mixture.masked(["bob"]), mixture.condition(hold=True), mixture.record() as records:
        mixture.preview(*inputs())
        model(*inputs())
    weights = records[0].output.weights
    assert (weights[:, mixture.names.index("bob")] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))
    ran = []
    model.blocks[0].register_forward_hook(lambda *_: ran.append(0))
    for context in (mixture.pinned({"ann": 1.0}), mixture.disabled()):
        with context, mixture.condition(hold=True):
            mixture.preview(*inputs())
    assert not ran


def test_weights_found_before_a_mask_do_not_pass_through_it():
    model, mixture = previewed()
    with mixture.condition(hold=True):
        mixture.preview(*inputs())
        with mixture.masked(["bob"]), pytest.raises(RuntimeError, match="seen nothing"):
            model(*inputs())
        with mixture.masked(["bob"]):
            mixture.preview(*inputs())
        with mixture.record() as records:
            model(*inputs())
    assert (records[0].output.weights[:, mixture.names.index("bob")] > 0).all()


def test_weights_found_without_gradient_do_not_pass_for_learnable():
    model, mixture = previewed()
    with mixture.condition(hold=True):
        with torch.no_grad():
            mixture.preview(*inputs())
            model(*inputs())
        with pytest.raises(RuntimeError, match="found without gradient"):
            model(*inputs())
        mixture.gates.requires_grad_(False)
        model(*inputs())


class Routed(torch.nn.Module):
    """Regroups its tokens between blocks, as a base with experts of its own does."""

    def __init__(self, tokens):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(2)])
        self.tokens = tokens

    def forward(self, x):
        x = self.blocks[0](x)
        return self.blocks[1](x.flatten(0, 1)[: self.tokens])


def test_copies_of_rows_take_their_rows_weights_and_regrouped_tokens_are_refused():
    x = torch.randn(2, 4, 6)
    model = Routed(tokens=8)
    made = [expert(name, model, ["blocks.0", "blocks.1"], [1, 2], seed=3) for name in "ab"]
    mixture = mix(model, made, gate=MoLE(), site="preview", blocks={"blocks.0": 6, "blocks.1": 6})
    with mixture.condition(hold=True), torch.no_grad():
        mixture.preview(x)
        for tokens in (2, 4, 6, 8):
            model.tokens = tokens
            if tokens != 2:
                with pytest.raises(ValueError, match=r"blocks\.1"):
                    model(x)
    toy, mixture = previewed()
    with mixture.condition(hold=True), torch.no_grad():
        mixture.preview(*inputs())
        once = toy(*inputs())
        twice = toy(*(given.repeat_interleave(2, 0) for given in inputs()))
    torch.testing.assert_close(twice, once.repeat_interleave(2, 0))


WHOLE = {"score": Hidden(pool=("last", "max")), "preview": "average", "top_k": 2}


@pytest.mark.parametrize("gate", [{}, WHOLE])
def test_a_pickled_model_is_told_nothing_yet(gate):
    model, mixture = previewed(**gate)
    with mixture.disabled():
        twin = pickle.loads(pickle.dumps(model))
    with twin.mixture.condition(hold=True), mixture.condition(hold=True):
        mixture.preview(*inputs())
        twin.mixture.preview(*inputs())
        torch.testing.assert_close(twin(*inputs()), model(*inputs()))


@pytest.mark.parametrize("gate", [{}, WHOLE])
def test_a_gate_file_brings_the_preview_back(tmp_path, gate):
    model, mixture = previewed(**gate)
    save_gates(mixture, tmp_path / "gates.safetensors")
    twin = copy.deepcopy(model).mixture.unmix()
    other = mix_from(twin, three(twin), tmp_path / "gates.safetensors", blocks=BLOCKS)
    outputs = []
    for one in (mixture, other):
        with one.condition(hold=True):
            one.preview(*inputs())
            outputs.append(one.model(*inputs()))
    torch.testing.assert_close(*outputs)


def test_what_cannot_be_previewed_is_said_and_leaves_the_model_in_order():
    model, mixture = previewed()
    with pytest.raises(RuntimeError, match=r"seen nothing of these rows.*preview"):
        model(*inputs())
    with pytest.raises(RuntimeError, match=r"enter condition\(hold=True\) first"):
        mixture.preview(*inputs())
    with mixture.condition(hold=True), pytest.raises(TypeError):
        mixture.preview(inputs()[0])
    blocks, model.blocks = model.blocks, model.blocks[:1]
    with mixture.condition(hold=True), pytest.raises(RuntimeError, match=r"never ran blocks\.1"):
        mixture.preview(*inputs())
    model.blocks = blocks
    with mixture.condition(hold=True):
        mixture.preview(*inputs())
        assert copy.deepcopy(model).mixture.names == mixture.names
        model(*inputs())
    by_position = previewed(over="position")[1]
    with (
        by_position.condition(hold=True),
        pytest.raises(ValueError, match="vary by position: use over='row'"),
    ):
        by_position.preview(*inputs())


def test_other_sites_and_constant_gates_run_nothing_in_a_preview():
    for placement in ({"site": "block"}, {"site": "preview", "after": 1}):
        model = Toy()
        mixture = mix(model, three(model), gate=Average(), blocks=BLOCKS, **placement)
        ran = []
        hook = model.register_forward_hook(lambda *_, ran=ran: ran.append(0))
        mixture.preview(*inputs())
        assert not ran
        hook.remove()
        with mixture.pinned(dict.fromkeys(mixture.names, 1 / 3)):
            expected = model(*inputs())
        torch.testing.assert_close(model(*inputs()), expected)
