"""Gates that read hidden states read them from their common mean."""

import pytest
import torch
from torch.nn.functional import normalize

from mole_vl import mix
from mole_vl.gates import Hidden, MoLE, Responses
from mole_vl.training import Term, centre_gates
from mole_vl.training.rows import rows_of_step
from tests.toys import BLOCKS, Toy, inputs, three


class Rows:
    """The toy's forwards, with padding of giant size at each row's end."""

    def __init__(self, over):
        self.model = Toy()
        gate = MoLE(score=Hidden(), over=over)
        self.mixture = mix(self.model, three(self.model)[:1], gate=gate, blocks=BLOCKS)
        self.real = torch.tensor([[True, True, True, False], [True, True, False, False]])

    def place(self, device):
        self.model.to(device)

    def batch(self, rows):
        x, context = inputs(len(rows), seed=rows[0].step)
        return x.masked_fill(~self.real[..., None], 1e4), context

    def losses(self, batch):
        with self.mixture.condition(real=self.real):
            return {"mean": Term(self.model(*batch).mean())}


@pytest.mark.parametrize("over", ["row", "position"])
def test_a_centre_is_the_mean_feature_of_real_positions_and_untrained_gates_stay_a_merge(over):
    task = Rows(over)
    seen = []
    task.model.blocks[1].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    before = task.losses(task.batch(rows_of_step(5, 0, 2)))["mean"].value
    seen.clear()
    centre_gates([task.mixture], task, rows=2, batches=3, seed=5)
    features = []
    for x in seen:
        for row, real in zip(x, task.real, strict=True):
            units = normalize(row[real], dim=-1)
            features += [units.mean(0)] if over == "row" else list(units)
    expected = normalize(torch.stack(features), dim=-1).mean(0) * 6**0.5
    torch.testing.assert_close(task.mixture.gate("blocks.1").score.centre, expected)
    after = task.losses(task.batch(rows_of_step(5, 0, 2)))["mean"].value
    torch.testing.assert_close(after, before)


def test_gates_that_read_no_hidden_state_are_left_alone():
    model = Toy()
    mixture = mix(model, three(model), gate=MoLE(score=Responses()), blocks=BLOCKS)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}

    class Task(Rows):
        def __init__(self):
            self.model, self.mixture, self.real = model, mixture, torch.ones(2, 4, dtype=torch.bool)

    centre_gates([mixture], Task(), rows=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())
