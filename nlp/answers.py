"""How well a model answers: exact match of what it generates, and likelihood of the answer."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nlp.around import Around, alone
from nlp.data import EncodedRow, TextBatch, Tokenizer, to_device
from nlp.forms import form_of
from nlp.task import answer_losses


def normalised(answer: str) -> str:
    """An answer as it is compared: no matter of case, of spaces, or of a last full stop."""
    return " ".join(answer.casefold().split()).rstrip(".")


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Tokenizer,
    rows: Sequence[EncodedRow],
    *,
    batch_rows: int = 32,
    around: Around = alone,
) -> list[str]:
    """What the model says to each prompt, greedily, up to its end token or the first line's end.

    Args:
        model: A language model of transformers; it keeps its mode (eval, as a rule).
        tokenizer: Its tokenizer.
        rows: Prompts; their answers only bound the length: the longest of a batch, and 2 more.
        batch_rows: Rows generated at once.
        around: Entered around each batch's `generate`.
    """
    said = [""] * len(rows)
    for places, batch in _batches(rows, tokenizer, batch_rows, prompts=True, model=model):
        with around(batch):
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max(len(rows[place].answer) for place in places) + 2,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        new = form_of(model).said(ids, batch)
        for place, text in zip(
            places, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            said[place] = text.strip().partition("\n")[0]
    return said


def exact_match(
    model: Any,
    tokenizer: Tokenizer,
    rows: Sequence[EncodedRow],
    *,
    batch_rows: int = 32,
    around: Around = alone,
) -> list[bool]:
    """For each row, whether the generated answer is the wanted one (see `normalised`)."""
    said = answers(model, tokenizer, rows, batch_rows=batch_rows, around=around)
    return [
        normalised(text) == normalised(row.row.answer) for text, row in zip(said, rows, strict=True)
    ]


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[EncodedRow],
    *,
    batch_rows: int = 32,
    around: Around = alone,
) -> list[float]:
    """For each row, the mean log-likelihood (nats) of a token of its answer, end included."""
    means = [0.0] * len(rows)
    for places, batch in _batches(rows, tokenizer, batch_rows, prompts=False, model=model):
        with around(batch):
            losses, scored = answer_losses(model, batch)
        for place, value in zip(places, (losses.sum(1) / scored.sum(1)).tolist(), strict=True):
            means[place] = -value
    return means


def _batches(
    rows: Sequence[EncodedRow],
    tokenizer: Tokenizer,
    batch_rows: int,
    *,
    prompts: bool,
    model: nn.Module,
) -> Iterator[tuple[list[int], TextBatch]]:
    """Rows of like length together, with their places in `rows`."""
    pad = tokenizer.pad_token_id
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].answer), len(rows[i].prompt)))
    for start in range(0, len(order), batch_rows):
        places = order[start : start + batch_rows]
        picked = [rows[place] for place in places]
        form = form_of(model)
        batch = form.prompts(picked, pad) if prompts else form.rows(picked, pad)
        yield places, to_device(batch, device)
