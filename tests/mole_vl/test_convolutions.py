"""Experts on convolutions: the same arithmetic, held against the plain loop and against peft."""

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import normalize

from mole_vl import Expert, Factors, mix, read_peft, write_peft
from mole_vl.gates import Hidden, MoLE, Responses, Sigmoid, Softmax, Sum
from mole_vl.peft_folder import trained_expert
from tests.toys import randomise


class Pictures(nn.Module):
    """Convolutions of several strides, paddings and dilations, and a linear layer of pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(3, 5, 3, padding=1)
        self.strided = nn.Conv2d(5, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2))
        self.point = nn.Conv2d(4, 6, 1, bias=False)
        self.map = nn.Linear(6, 2)

    def forward(self, x):
        x = self.point(self.strided(self.wide(x).tanh()).tanh()).tanh()
        return self.map(x.flatten(2).transpose(1, 2))


def conv_expert(name, model, ranks, seed):
    torch.manual_seed(seed)
    layers = {}
    for path, rank in ranks.items():
        out, *into = model.get_submodule(path).weight.shape
        layers[path] = Factors(torch.randn(rank, *into), torch.randn(out, rank) / 3, 0.2 * seed)
    return Expert(name, layers)


def two(model):
    return [
        conv_expert("ann", model, {"wide": 2, "strided": 3, "map": 1}, seed=1),
        conv_expert("bob", model, {"strided": 1, "point": 4}, seed=2),
    ]


def looped(model, experts, weights, x):
    changed = {name: p.detach().clone() for name, p in model.named_parameters()}
    for one, weight in zip(experts, weights, strict=True):
        for path, factors in one.layers.items():
            changed[f"{path}.weight"] += weight * factors.delta()
    return functional_call(model, changed, (x,))


def test_weights_by_row_are_each_rows_own_weight_arithmetic():
    model = Pictures()
    experts = two(model)
    x = torch.randn(3, 3, 8, 7)
    weights = torch.tensor([[1.0, 0.0], [0.3, -0.7], [2.0, 1.0]])
    expected = [looped(model, experts, row, x[i : i + 1]) for i, row in enumerate(weights)]
    mixture = mix(model, experts, gate=Sum(), site="matrix")
    with mixture.pinned(weights):
        torch.testing.assert_close(model(x), torch.cat(expected))


def test_bake_and_unmix_give_the_same_and_the_base():
    model = Pictures()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    experts = two(model)
    x = torch.randn(2, 3, 8, 7)
    expected = looped(model, experts, [1.0, 1.0], x)
    mixture = mix(model, experts, gate=Sum(), site="matrix")
    torch.testing.assert_close(model(x), expected)
    mixture.bake()
    torch.testing.assert_close(model(x), expected)
    mixture.unmix()
    assert isinstance(model.wide, nn.Conv2d)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("score", [Hidden(), Responses()])
def test_a_gate_reads_a_convolutions_pixels_whatever_their_number(score):
    model = Pictures()
    gate = MoLE(score=score, normaliser=Softmax())
    mixture = mix(model, two(model), gate=gate, site="matrix")
    randomise(mixture)
    x = torch.randn(2, 3, 8, 7)
    with mixture.record() as records:
        model(x)
    seen = {record.site: record.output.weights for record in records}
    pixels = normalize(x.flatten(2).transpose(1, 2), dim=-1).mean(1)
    own = mixture.gate("wide")
    if isinstance(score, Hidden):
        units = normalize(normalize(pixels, dim=-1) * 3**0.5 - own.score.centre, dim=-1) * 3**0.5
        logits = units @ own.score.weight.T + own.score.bias
    else:
        # What each expert answers to a picture that is everywhere as the mean pixel.
        flat = pixels[:, :, None, None].expand(-1, -1, 3, 3)
        answers = []
        for one in two(model):
            if "wide" in one.layers:
                answers.append(nn.functional.conv2d(flat, one.layers["wide"].delta())[..., 0, 0])
            else:
                answers.append(torch.zeros(2, 5))
        units = normalize(torch.cat(answers, -1), dim=-1) * 10**0.5
        logits = units @ own.score.weight.flatten(1).T + own.score.bias
    torch.testing.assert_close(seen["wide"], own.normaliser(logits))
    model(torch.randn(2, 3, 12, 9))


def test_gradients_reach_the_gates_and_equal_the_loops():
    model = Pictures()
    experts = two(model)
    x = torch.randn(3, 3, 8, 7)
    mixture = mix(model, experts, gate=Sum(), site="matrix")
    leaf = torch.tensor([[1.0, 0.5], [0.3, -0.7], [2.0, 1.0]], requires_grad=True)
    twin = leaf.detach().clone().requires_grad_()
    with mixture.pinned(leaf):
        model(x).square().sum().backward()
    mixture.unmix()
    rows = [looped(model, experts, twin[i], x[i : i + 1]) for i in range(3)]
    torch.cat(rows).square().sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


def test_a_linear_update_fits_a_convolution_of_single_pixels_and_the_other_way_round():
    model = Pictures()
    made = conv_expert("ann", model, {"point": 2, "map": 1}, seed=1)
    layers = {
        "point": Factors(made.layers["point"].a.flatten(1), made.layers["point"].b, 0.2),
        "map": Factors(made.layers["map"].a[:, :, None, None], made.layers["map"].b, 0.2),
    }
    x = torch.randn(2, 3, 8, 7)
    expected = looped(model, [made], [1.0], x)
    mix(model, [Expert("ann", layers)], gate=Sum(), site="matrix")
    torch.testing.assert_close(model(x), expected)


def test_what_does_not_fit_a_convolution_is_refused():
    model = Pictures()
    odd = Expert("ann", {"wide": Factors(torch.ones(1, 3, 5, 5), torch.ones(5, 1), 1.0)})
    with pytest.raises(ValueError, match=r"wide has an update of shape \(5, 3, 5, 5\), expected"):
        mix(model, [odd], gate=Sum(), site="matrix")
    model.wide = nn.Conv2d(3, 6, 3, padding=1, groups=3)
    grouped = Expert("ann", {"wide": Factors(torch.ones(1, 1, 3, 3), torch.ones(6, 1), 1.0)})
    with pytest.raises(ValueError, match=r"matches no layer of this model: it changes wide"):
        mix(model, [grouped], gate=Sum(), site="matrix")


def test_weights_by_position_are_refused_at_a_convolution():
    model = Pictures()
    gate = MoLE(normaliser=Sigmoid(), over="position")
    mix(model, [conv_expert("ann", model, {"wide": 1}, seed=1)], gate=gate, site="matrix")
    with pytest.raises(ValueError, match="wide: its gate's weights vary by position"):
        model(torch.randn(2, 3, 8, 7))


def test_peft_folders_of_convolutions_are_read_and_written_as_peft_does(tmp_path):
    settings = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["wide", "strided", "point", "map"],
        rank_pattern={"point": 4},
    )  # fmt: skip
    base = Pictures()
    base.strided.dilation = (1, 1)  # which peft would not take over
    state = {name: value.clone() for name, value in base.state_dict().items()}
    wrapped = peft.get_peft_model(base, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, 8, 7)
    expected = wrapped(x)
    wrapped.save_pretrained(tmp_path / "ann")
    expert = read_peft(tmp_path / "ann")
    assert trained_expert(wrapped.get_base_model(), "ann").digest == expert.digest
    model = Pictures()
    model.strided.dilation = (1, 1)
    model.load_state_dict(state)
    mixture = mix(model, [expert], gate=Sum(), site="matrix")
    torch.testing.assert_close(model(x), expected)
    write_peft(expert, tmp_path / "bob")
    loaded = peft.PeftModel.from_pretrained(mixture.unmix(), tmp_path / "bob")
    torch.testing.assert_close(loaded(x), expected)
