from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from mole_vl.training import FitConfig, Row, Term, fit
from nlp.data import collate, encode_rows
from nlp.task import LanguageTask, answer_losses
from tests.nlp.toys import ROWS, tiny_model, tiny_tokenizer


def naive(model, row):
    """Cross-entropy of each answer token of one row, unpadded, with all logits computed."""
    ids = torch.tensor([row.prompt + row.answer])
    logits = model(input_ids=ids).logits[0]
    start = len(row.prompt)
    return F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none")


def build(model, rows, **settings):
    parameters = {"norm": model.model.norm.weight.requires_grad_(True)}
    return LanguageTask(model, rows, pad=0, parameters=parameters, **settings)


def test_losses_equal_each_row_by_itself():
    model, rows = tiny_model(), encode_rows(ROWS, tiny_tokenizer())
    losses, scored = answer_losses(model, collate(rows, pad=0))
    for row, found, mask in zip(rows, losses, scored, strict=True):
        torch.testing.assert_close(found[mask], naive(model, row))
    assert losses[~scored].eq(0).all()


def test_the_term_is_the_mean_over_scored_tokens_whatever_the_padding():
    model, rows = tiny_model(), encode_rows(ROWS, tiny_tokenizer())
    task = build(model, rows)
    batch = collate(rows, pad=0)
    expected = torch.cat([naive(model, row) for row in rows])
    assert task.units(batch) == len(expected)
    torch.testing.assert_close(task.losses(batch)["lm"].value, expected.mean())
    other = collate(rows, pad=5)
    torch.testing.assert_close(task.losses(other)["lm"].value, expected.mean())


def test_rows_are_asked_one_by_one():
    model, rows = tiny_model(), encode_rows(ROWS, tiny_tokenizer())
    task = build(model, rows)
    assert task.sizes() == [len(row.prompt) + len(row.answer) for row in rows]
    places = [2, 0, 3]
    found = task.likelihoods(task.examples(places))
    expected = torch.stack([-naive(model, rows[place]).mean() for place in places])
    torch.testing.assert_close(found, expected)


def test_only_columns_that_score_something_reach_the_head():
    model, rows = tiny_model(), encode_rows(ROWS, tiny_tokenizer())
    seen = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    batch = collate(rows, pad=0)
    answer_losses(model, batch)
    first = min(len(row.prompt) for row in rows)
    assert seen == [batch["input_ids"].shape[1] - first]


def test_an_epoch_shows_every_row_once():
    rows = encode_rows(ROWS, tiny_tokenizer())
    task = build(tiny_model(), rows)
    batches = [task.batch([Row(3, step, i, 2) for i in range(2)]) for step in range(2)]
    seen = sorted(
        tuple(ids[mask].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["prompt_mask"], strict=True)
    )
    assert seen == sorted(row.prompt for row in rows)


def test_alike_rows_come_together_and_an_epoch_shows_every_row_once():
    rows = encode_rows(ROWS, tiny_tokenizer())
    task = build(tiny_model(), rows, alike=True)
    found = []
    for step in range(2):
        batch = task.batch([Row(3, step, i, 2) for i in range(2)])
        seen = zip(batch["input_ids"], batch["prompt_mask"], strict=True)
        found.append({tuple(ids[mask].tolist()) for ids, mask in seen})
    by_length = sorted(rows, key=lambda row: len(row.prompt + row.answer))
    expected = [{row.prompt for row in by_length[place : place + 2]} for place in (0, 2)]
    assert found in (expected, expected[::-1])


def test_around_sees_the_batch_wraps_the_forward_and_adds_terms():
    rows = encode_rows(ROWS, tiny_tokenizer())
    events = []
    model = tiny_model()
    model.register_forward_hook(lambda *_: events.append("forward"))

    @contextmanager
    def around(batch):
        events.append(batch["prompt_mask"].sum().item())
        yield lambda: events.append("terms") or {"extra": Term(torch.tensor(2.0), 0.5)}
        events.append("closed")

    terms = build(model, rows, around=around).losses(collate(rows, pad=0))
    assert events == [sum(len(row.prompt) for row in rows), "forward", "terms", "closed"]
    assert terms["extra"] == Term(torch.tensor(2.0), 0.5)
    assert terms.keys() == {"lm", "extra"}


@pytest.mark.parametrize("micro_rows", [1, 2])
def test_pieces_weigh_by_their_scored_tokens(tmp_path, micro_rows):
    rows = encode_rows(ROWS, tiny_tokenizer())
    weights = []
    for name, pieces in (("whole", None), ("pieces", micro_rows)):
        model = tiny_model()
        config = FitConfig(
            output=tmp_path / name, steps=3, rows=4, micro_rows=pieces, lr=0.1, progress=False
        )
        fit(build(model, rows), config)
        weights.append(model.model.norm.weight.detach().clone())
    torch.testing.assert_close(*weights)
    assert (weights[0] - 1).abs().min() > 0.01
