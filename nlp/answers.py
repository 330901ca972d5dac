"""How well a model answers: exact match of what it generates, and likelihood of the answer."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nlp.around import Around, alone
from nlp.data import EncodedRow, TextBatch, Tokenizer, to_device
from nlp.forms import Form, form_of
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
        rows: Prompts; their answers only bound the length: the longest of a batch, and 2 more
            where the model has positions for them.
        batch_rows: Rows generated at once.
        around: Entered around each batch's `generate`.
    """
    said = [""] * len(rows)
    for places, batch in _batches(rows, tokenizer, batch_rows, prompts=True, model=model):
        with around(batch):
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=_new(form_of(model), [rows[place] for place in places]),
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
    form = form_of(model)
    for places in _groups(rows, order, batch_rows, form):
        picked = [rows[place] for place in places]
        batch = form.prompts(picked, pad) if prompts else form.rows(picked, pad)
        yield places, to_device(batch, device)


def _groups(
    rows: Sequence[EncodedRow], order: Sequence[int], batch_rows: int, form: Form
) -> Iterator[list[int]]:
    """Places in their order, as many at once as may be and as the model has positions for."""
    group: list[int] = []
    for place in order:
        wider = [*group, place]
        if group and (len(group) == batch_rows or not _fit(form, [rows[p] for p in wider], 0)):
            yield group
            wider = [place]
        group = wider
    if group:
        yield group


def _fit(form: Form, rows: Sequence[EncodedRow], more: int) -> bool:
    """Whether the model has positions for the longest prompt, the longest answer, and more."""
    if form.longest is None:
        return True
    answer = max(len(row.answer) for row in rows)
    return max(len(row.prompt) for row in rows) <= form.room(answer + more)


def _new(form: Form, rows: Sequence[EncodedRow]) -> int:
    """How many tokens are generated: the longest answer's, and up to 2 more to be wrong in."""
    more = next((more for more in (2, 1) if _fit(form, rows, more)), 0)
    return max(len(row.answer) for row in rows) + more
