import torch

from mole_vl import mix
from mole_vl.gates import GateOutput, MoLE, ScaledSoftmax, Sigmoid, Softmax
from mole_vl.losses import balance, mean_shares
from mole_vl.passes import Record
from tests.toys import BLOCKS, Toy, inputs, randomise, three


def test_balance_equals_its_formula_and_leaves_padding_out():
    weights = torch.rand(2, 3, 4)
    real = torch.tensor([[True, True, False], [True, False, False]])
    weights[~real] = float("nan")
    rows = torch.rand(5, 4)
    records = [
        Record("a", GateOutput(weights, None, weights), real),
        Record("b", GateOutput(rows, None, rows), real),
    ]
    first = torch.stack([w / w.sum() for w in (weights[0, 0], weights[0, 1], weights[1, 0])]).mean(
        0
    )
    second = (rows / rows.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(mean_shares(records), torch.stack([first, second]))
    q = (first + second) / 2
    torch.testing.assert_close(balance(records), -q.log().sum())


def test_balance_moves_every_gate_away_from_equal_shares_and_none_at_them():
    for normaliser in (Softmax(), ScaledSoftmax(), Sigmoid()):
        model = Toy()
        mixture = mix(model, three(model), gate=MoLE(normaliser=normaliser), blocks=BLOCKS)
        for size, moves in ((0.0, False), (0.5, True)):
            randomise(mixture, size=size)
            with mixture.record() as records:
                model(*inputs())
            balance(records).backward()
            for name, parameter in mixture.named_parameters():
                moved = parameter.grad.abs().max() > 1e-6
                assert moved == moves, (normaliser, name)
            mixture.zero_grad()
