"""What forwards are told: masks, pins, strength, rows, held results."""

import copy

import pytest
import torch

from mole_vl import mix
from mole_vl.gates import (
    Free,
    MoLE,
    ScaledSoftmax,
    Sigmoid,
    Softmax,
    Sum,
)
from tests.toys import (
    BLOCKS,
    Toy,
    inputs,
    randomise,
    three,
    with_constant_weights,
)


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


def test_a_model_may_move_to_its_device_when_it_is_called():
    """As offloading does; the device meta stands for the accelerator: it refuses a mixture too."""
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(score=Free()), blocks=BLOCKS)

    def moved(module, args):
        module.to("meta")
        return tuple(x.to("meta") for x in args)

    pinned = mixture.pinned(torch.rand(3, 3))
    masked = mixture.masked(["bob"])
    with pinned:
        model.register_forward_pre_hook(moved)
        assert model(*inputs()).is_meta
    with masked:
        assert model(*inputs()).is_meta


def test_weights_of_other_rows_are_no_beams():
    """A batch of guidance is no multiple of its pictures in place: only a hold knows of beams."""
    model = Toy()
    mixture = mix(model, three(model), gate=Sum(), blocks=BLOCKS)
    with mixture.pinned(torch.eye(3)[:2]):
        with pytest.raises(
            ValueError, match=r"vary over rows, \(2,\), but the layer reads \(4, 4\)"
        ):
            model(*inputs(rows=4))
        with mixture.condition(hold=True):
            found = model(*inputs(rows=4))
    with mixture.pinned(torch.eye(3)[[0, 0, 1, 1]]):
        torch.testing.assert_close(found, model(*inputs(rows=4)))
