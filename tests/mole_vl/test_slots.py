"""Gates over slots: every row says which expert plays which part."""

import pytest
import torch

from mole_vl import Expert, mean_weights, mix, mix_from, save_gates
from mole_vl.gates import Free, Hidden, MoLE, Responses, ScaledSoftmax, Sigmoid
from mole_vl.losses import balance
from tests.toys import BLOCKS, SITES, Toy, expert, inputs, randomise

SLOTS = {"subject": ["ann", "bob"], "style": ["cyd", "dot"]}
PATHS = ["blocks.0.attention.q", "blocks.1.ff.0", "blocks.0.attention.k"]
# For three rows: ann in cyd, bob in dot, ann in dot.
FILLED = torch.tensor([[0, 2], [1, 3], [0, 3]])


def four(model):
    return [
        expert(name, model, PATHS, [1 + i, 2, 1], seed=i + 1)
        for i, name in enumerate(["ann", "bob", "cyd", "dot"])
    ]


def slotted(site=SITES[2], score=None, normaliser=None):
    model = Toy()
    gate = MoLE(score=score or Hidden(), normaliser=normaliser or Sigmoid())
    mixture = mix(model, four(model), gate=gate, **site, blocks=BLOCKS, slots=SLOTS)
    randomise(mixture)
    return model, mixture


def row_of(tensors, row):
    return [tensor[row : row + 1] for tensor in tensors]


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("score", [Hidden(), Free()])
def test_every_row_is_as_a_mixture_of_its_own_two_experts(tmp_path, site, score):
    model, mixture = slotted(site, score, ScaledSoftmax())
    with mixture.condition(filled=FILLED):
        together = model(*inputs())
    save_gates(mixture, tmp_path / "gates.safetensors")
    experts = four(Toy())
    mixture.unmix()
    for row, (subject, style) in enumerate(FILLED.tolist()):
        playing = [
            Expert("style", experts[style].layers),
            Expert("subject", experts[subject].layers),
        ]
        alone = mix_from(model, playing, tmp_path / "gates.safetensors", blocks=BLOCKS)
        assert alone.names == ("subject", "style")
        torch.testing.assert_close(model(*row_of(inputs(), row)), together[row : row + 1])
        alone.unmix()


def test_only_the_experts_of_a_row_speak_in_it_and_the_gates_learn():
    model, mixture = slotted()
    with mixture.condition(filled=FILLED), mixture.record() as records:
        out = model(*inputs())
    for record in records:
        assert torch.equal(record.output.experts, FILLED)
    places = torch.zeros(3, 4).scatter(1, FILLED, records[0].output.weights.detach())
    assert (places[:, 1] == torch.tensor([0, places[1, 1], 0])).all()
    (out.square().mean() + balance(records)).backward()
    assert all(p.grad.abs().sum() > 0 for p in mixture.gates.parameters())


def test_guidance_takes_a_pictures_weights_and_its_experts():
    model, mixture = slotted()
    x, context = inputs()
    twice = torch.cat([torch.randn_like(x), x]), torch.cat([context, context])
    source = torch.tensor([3, 4, 5, 3, 4, 5])
    with mixture.condition(filled=FILLED):
        expected = model(x, context)
    with mixture.condition(filled=FILLED.repeat(2, 1), source=source):
        found = model(*twice)
    torch.testing.assert_close(found[3:], expected)


def test_pinned_weights_are_of_experts_and_need_nobody_in_a_slot():
    model, mixture = slotted()
    with mixture.pinned({"bob": 2.0}):
        found = model(*inputs())
    baked = mixture
    baked.bake({"bob": 2.0})
    torch.testing.assert_close(model(*inputs()), found)


def test_mistakes_are_named():
    model, mixture = slotted()
    with pytest.raises(RuntimeError, match="the gates weigh the slots subject, style: say who"):
        model(*inputs())
    with pytest.raises(ValueError, match=r"filled is of shape \(3, 3\), expected \(rows, 2\)"):
        mixture.condition(filled=torch.zeros(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the slot 'style' has experts \(2, 3\), not 1"):
        mixture.condition(filled=torch.tensor([[0, 1]]))
    with mixture.condition(filled=FILLED[:2]), pytest.raises(ValueError, match="are for 2 rows"):
        model(*inputs())
    with pytest.raises(ValueError, match="masked: these gates weigh slots"):
        mixture.masked(["ann"])
    with pytest.raises(ValueError, match="these gates weigh slots, whose experts change"):
        mixture.bake()
    with mixture.condition(filled=FILLED), mixture.record() as records:
        model(*inputs())
    with pytest.raises(ValueError, match="weigh slots, whose experts change by row"):
        mean_weights(records)
    plain = Toy()
    with pytest.raises(ValueError, match=r"slots: .*cyd stands more than once; dot is in no slot"):
        mix(plain, four(plain), gate=MoLE(), blocks=BLOCKS,
            slots={"a": ["ann", "cyd"], "b": ["bob", "cyd"]})  # fmt: skip
    with pytest.raises(ValueError, match="Responses: what an expert answers is its own"):
        mix(plain, four(plain), gate=MoLE(score=Responses()), blocks=BLOCKS, slots=SLOTS)
    other = mix(plain, four(plain), gate=MoLE(), blocks=BLOCKS)
    with pytest.raises(ValueError, match="filled is for gates that weigh slots"):
        other.condition(filled=FILLED)
