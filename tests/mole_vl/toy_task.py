"""A task on the toy mixture whose rows have different numbers of units; also a program."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn

from mole_vl import mix
from mole_vl.gates import MoLE
from mole_vl.losses import balance
from mole_vl.training import FitConfig, Row, Term, fit
from tests.toys import BLOCKS, Toy, randomise, three


class ToyTask:
    """Gates trained to answer as one expert alone would; positions 0 to n of a row are scored."""

    def __init__(
        self,
        balance: float = 0.1,
        stop_at: int | None = None,
        poison_at: int | None = None,
        delay: float = 0.0,
    ) -> None:
        torch.manual_seed(1)
        self.model = Toy()
        self.mixture = mix(self.model, three(self.model), gate=MoLE(), blocks=BLOCKS)
        randomise(self.mixture)
        self.balance = balance
        self.stop_at = stop_at
        self.poison_at = poison_at
        self.delay = delay

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.mixture.named_parameters())

    def place(self, device: torch.device) -> None:
        self.model.to(device)

    def batch(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        if rows[0].step == self.stop_at:
            raise KeyboardInterrupt
        time.sleep(self.delay)
        x = torch.stack([torch.randn(4, 3, generator=row.generator()) for row in rows])
        context = torch.stack([torch.randn(2, 5, generator=row.generator(1)) for row in rows])
        scored = torch.tensor([1 + row.index % 4 for row in rows])
        if rows[0].step == self.poison_at:
            x = x * float("nan")
        return x, context, torch.arange(4) < scored[:, None]

    def units(self, batch: tuple[Tensor, Tensor, Tensor]) -> int:
        return int(batch[2].sum())

    def losses(self, batch: tuple[Tensor, Tensor, Tensor]) -> Mapping[str, Term]:
        x, context, scored = batch
        with torch.no_grad(), self.mixture.pinned({"cyd": 1.0}):
            target = self.model(x, context)
        with self.mixture.record() as records:
            y = self.model(x, context)
        terms = {"fit": Term((y - target).square().mean(-1)[scored].mean())}
        if self.balance:
            terms["balance"] = Term(balance(records), self.balance, per_unit=False)
        return terms


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, steps, save_every, delay = sys.argv[1:]
    settings = FitConfig(
        output=Path(output), steps=int(steps), rows=8, lr=0.02, save_every=int(save_every),
        log_every=1, progress=False,
    )  # fmt: skip
    fit(ToyTask(delay=float(delay)), settings)
    Path(f"{output}.processes").write_text(str(PartialState().num_processes))
