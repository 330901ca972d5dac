"""Mistakes in the use of a mixture are sentences, and change nothing."""

import pytest
import torch
from torch import nn

from mole_vl import Expert, Factors, mix
from mole_vl.gates import (
    Constants,
    MoLE,
    Responses,
    Sigmoid,
    Sum,
)
from tests.toys import (
    BLOCKS,
    Toy,
    expert,
    inputs,
    three,
)


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
            "1 layers that this model lacks, or that take no experts: nowhere.q",
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


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_constants_that_are_no_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"weight of 'bob' is {wrong}, expected a finite number"):
        Constants(weights={"ann": 1.0, "bob": wrong})
    with pytest.raises(ValueError, match=rf"weight of 'ann' at 'q' is {wrong}, expected a finite"):
        Constants(weights={"ann": 1.0}, by_site={"q": {"ann": wrong}})


def test_factors_of_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"factor a of q is of torch.int32, expected floating"):
        Expert("eve", {"q": Factors(torch.ones(1, 2).int(), torch.ones(2, 1), 1.0)})


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
    with pytest.raises(ValueError, match="weights: ann weighs 'much', expected a number"):
        mixture.pinned({"ann": "much"})
    with pytest.raises(ValueError, match="these gates read their input"):
        mixture.bake()
    with pytest.raises(RuntimeError, match="ran outside of a forward of the mixed model"):
        model.blocks[0](torch.zeros(1, 4, 6), torch.zeros(1, 2, 5))
    with pytest.raises(
        ValueError, match="weights are given for ann; the experts are ann, bob, cyd"
    ):
        mix(Toy(), three(Toy()), gate=Constants(weights={"ann": 1.0}), site="matrix")
    with pytest.raises(ValueError, match="strength is 'a', expected a number"):
        mixture.scaled("a")
    # Two would multiply the rows, three the experts, by chance of their number.
    for several in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0, 2.0]), torch.ones(0)):
        with pytest.raises(ValueError, match=r"strength has \d values, expected one"):
            mixture.scaled(several)


@pytest.mark.parametrize("baked", [False, True])
def test_an_unmixed_handle_says_so_whatever_it_is_asked(baked):
    model = Toy()
    mixture = mix(model, three(model), gate=Sum(), site="matrix")
    if baked:
        mixture.bake()
    mixture.unmix()
    contexts = [
        mixture.disabled,
        lambda: mixture.scaled(0.5),
        lambda: mixture.masked(["ann"]),
        lambda: mixture.pinned({"ann": 1.0}),
        lambda: mixture.condition(hold=True),
        mixture.record,
    ]
    for context in contexts:
        with pytest.raises(RuntimeError, match="was unmixed: mix the model again"), context():
            pass
    for act in (mixture.bake, mixture.unmix, mixture.preview, mixture.base_state_dict):
        with pytest.raises(RuntimeError, match="was unmixed: mix the model again"):
            act()


@pytest.mark.parametrize(
    ("experts", "gate", "message"),
    [
        (["loras/ann"], MoLE(), r"expert 0 is a str, expected an Expert: .* read_peft\(path\)"),
        ([{"unet": None}], MoLE(), r"expert 0 is a dict, .* component of read_components"),
        ("loras/ann", MoLE(), "experts is a str, expected a list of Expert"),
        (None, MoLE, r"gate is the class MoLE, expected an instance: MoLE\(\)"),
        (None, "MoLE", "gate is a str, expected a GateSpec"),
    ],
)
def test_what_is_no_expert_or_no_gate_is_said_in_a_sentence(experts, gate, message):
    model = Toy()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        mix(model, experts or three(model), gate=gate, blocks=BLOCKS)
    assert str(model) == before


def test_a_gate_of_classes_is_refused_with_all_that_is_wrong():
    with pytest.raises(
        ValueError,
        match=r"score is the class Responses, expected an instance: Responses\(\); "
        r"normaliser is the class Sigmoid, expected an instance: Sigmoid\(\)",
    ):
        MoLE(score=Responses, normaliser=Sigmoid)


def test_an_expert_shows_itself_without_its_numbers():
    factors = Factors(torch.ones(2, 3), torch.ones(5, 2), 0.5)
    assert str(factors) == "Factors(a=(2, 3), b=(5, 2), scale=0.5)"
    lone = Expert("eve", {"q": factors, "k": Factors(torch.ones(1, 3), torch.ones(5, 1), 1.0)})
    assert str(lone) == "Expert('eve', 2 layers of rank 1, 2, memory)"
    with pytest.raises(ValueError, match="name is 'a/b', expected a plain word without slashes"):
        Expert("a/b", lone.layers)


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


@pytest.mark.parametrize("wrong", ["ann", ["ann", "bob", "cyd"], [["ann"], 1.0], object()])
def test_weights_that_are_no_numbers_are_one_sentence(wrong):
    mixture = mix(Toy(), three(Toy()), gate=Sum(), site="matrix")
    for use in (mixture.bake, mixture.pinned, mixture.constant_weights):
        with pytest.raises(ValueError, match=r"^weights is .*expected numbers, or numbers by exp"):
            use(wrong)
