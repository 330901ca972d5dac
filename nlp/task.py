"""Language modelling on the answers, as a task for `fit`."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_vl.training import Alike, Row, Term
from nlp.around import Around, alone
from nlp.data import IGNORED, EncodedRow, TextBatch, to_device
from nlp.forms import form_of


def answer_losses(model: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each scored token.

    Returns:
        losses (B, S) in nats, 0 where nothing is scored, and that mask (B, S), over S positions
        (see `Form.predictions`).
    """
    logits, kept = form_of(model).predictions(model, batch)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), kept.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(kept), kept != IGNORED


class LanguageTask:
    """Teach a model the answers of some rows; the loss is a mean over scored tokens.

    Args:
        model: A language model of transformers, causal or encoder-decoder, plain, under peft, or
            mixed.
        rows: What it is taught.
        pad: The id that pads.
        parameters: What is trained, by name.
        around: Entered around each forward; what it yields adds terms to the loss.
        alike: Whether rows of like length come in one batch, which spares padding.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[EncodedRow],
        *,
        pad: int,
        parameters: Mapping[str, nn.Parameter],
        around: Around = alone,
        alike: bool = False,
    ) -> None:
        self._model = model
        self._form = form_of(model)
        self._rows = rows
        self._pad = pad
        self._parameters = parameters
        self._around = around
        self._alike = Alike(self.sizes()) if alike else None
        self._device = torch.device("cpu")

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the caller said is trained."""
        return self._parameters

    def place(self, device: torch.device) -> None:
        """Move the model; batches follow it."""
        self._device = device
        self._model.to(device)

    def batch(self, rows: Sequence[Row]) -> TextBatch:
        """The epoch's next examples; every row of the global batch is another one."""
        pick = self._alike.pick if self._alike else lambda row: row.pick(len(self._rows))
        batch = self.examples([pick(row) for row in rows])
        batch["seeds"] = torch.tensor([row.number() for row in rows], device=self._device)
        return batch

    def sizes(self) -> Sequence[int]:
        """Tokens of each row, its answer's among them."""
        return [len(row.prompt) + len(row.answer) for row in self._rows]

    def examples(self, places: Sequence[int]) -> TextBatch:
        """The batch of these rows."""
        picked = [self._rows[place] for place in places]
        return to_device(self._form.rows(picked, self._pad), self._device)

    def likelihoods(self, batch: TextBatch) -> Tensor:
        """Mean log-likelihood of a scored token of each row, (B,), in nats."""
        with self._around(batch):
            losses, scored = answer_losses(self._model, batch)
        return -losses.sum(1) / scored.sum(1)

    def units(self, batch: TextBatch) -> int:
        """Scored tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def losses(self, batch: TextBatch) -> Mapping[str, Term]:
        """The term `lm`, in nats a scored token, and whatever `around` adds."""
        with self._around(batch) as extra_terms:
            losses, scored = answer_losses(self._model, batch)
            return {"lm": Term(losses.sum() / scored.sum()), **extra_terms()}
