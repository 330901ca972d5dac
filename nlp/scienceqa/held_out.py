"""The loss on rows that a training does not learn, told with each checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import gather_object

from mole_vl import Mixture
from mole_vl.files import new_file, read_object
from mole_vl.training import FitConfig, Progress
from nlp.adapter import bound
from nlp.answers import log_likelihood
from nlp.data import EncodedRow, Tokenizer

FILE = "held_out.json"


class HeldOut:
    """A watch of `fit`: nats a scored token, in the mean over the rows, by step, in a JSON file.

    Args:
        mixture: In training.
        tokenizer: Its model's.
        rows: Those that are not learned.
        run: The loop; the file lies in its folder.
        batch_rows: Rows of a forward.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        rows: Sequence[EncodedRow],
        run: FitConfig,
        batch_rows: int,
    ) -> None:
        self._mixture = mixture
        self._tokenizer = tokenizer
        self._rows = rows
        self._every = run.save_every
        self._batch_rows = batch_rows
        self.file = Path(run.output) / FILE

    def __call__(self, progress: Progress) -> None:
        """Called after each step; every process asks its part of the rows."""
        if progress.step % self._every and progress.step != progress.steps:
            return
        accelerator = progress.accelerator
        mine = self._rows[accelerator.process_index :: accelerator.num_processes]
        self._mixture.eval()
        with accelerator.autocast():
            found = log_likelihood(
                self._mixture.model,
                self._tokenizer,
                mine,
                batch_rows=self._batch_rows,
                around=bound(self._mixture),
            )
        self._mixture.train()
        told = gather_object(found)
        loss = -sum(told) / len(told)
        accelerator.log({"held-out loss": loss}, step=progress.step)
        if accelerator.is_main_process:
            before = read_object(self.file) if self.file.is_file() else {}
            # A run that was broken off after this file was written comes by again.
            kept = {step: value for step, value in before.items() if int(step) < progress.step}
            with new_file(self.file) as partial:
                partial.write_text(json.dumps({**kept, str(progress.step): loss}, indent=1))

    def last(self) -> float | None:
        """What was told last, if anything was."""
        return list(read_object(self.file).values())[-1] if self.file.is_file() else None
