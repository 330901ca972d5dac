from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nlp.answers import answers, exact_match, log_likelihood
from nlp.data import EncodedRow, TextRow, encode_rows
from tests.nlp.test_task import naive
from tests.nlp.toys import LETTERS, ROWS, tiny_model, tiny_tokenizer


def said_alone(model, tokenizer, row, tokens):
    """Greedy decoding of one prompt, without cache or padding."""
    ids = list(row.prompt)
    for _ in range(tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(ids[len(row.prompt) :], skip_special_tokens=True)
    return text.strip().partition("\n")[0]


@pytest.fixture
def world():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # an untrained model repeats one letter; this one babbles
    same_length = [TextRow(row.prompt, row.answer[:4], row.task) for row in ROWS]
    return model, tokenizer, encode_rows(same_length, tokenizer)


@pytest.mark.parametrize("batch_rows", [1, 3, 32])
def test_batched_answers_equal_each_prompt_by_itself_in_order(world, batch_rows):
    model, tokenizer, rows = world
    expected = [said_alone(model, tokenizer, row, len(row.answer) + 2) for row in rows]
    assert answers(model, tokenizer, rows, batch_rows=batch_rows) == expected
    assert len(set(expected)) > 1


def test_a_hit_is_the_wanted_answer_whatever_its_case_spaces_or_stop(world):
    model, tokenizer, rows = world
    row = rows[0]
    said = answers(model, tokenizer, [row])[0]
    for wanted, hit in ((said.upper() + ".", True), (f" {said}  ", True), (said[:-1], False)):
        # As many tokens as before: the wanted answer's length bounds what is generated.
        wished = replace(row, row=replace(row.row, answer=wanted))
        assert exact_match(model, tokenizer, [wished]) == [hit]


def test_likelihoods_equal_each_row_by_itself(world):
    model, tokenizer, rows = world
    expected = [-naive(model, row).mean().item() for row in rows]
    for batch_rows in (1, 3):
        found = log_likelihood(model, tokenizer, rows, batch_rows=batch_rows)
        assert found == pytest.approx(expected, rel=1e-4)


def test_around_is_entered_once_a_batch_with_its_prompt_mask(world):
    model, tokenizer, rows = world
    prompts = []

    @contextmanager
    def around(batch):
        prompts.append(batch["prompt_mask"].sum().item())
        yield dict

    answers(model, tokenizer, rows, batch_rows=2, around=around)
    log_likelihood(model, tokenizer, rows, batch_rows=4, around=around)
    total = sum(len(row.prompt) for row in rows)
    assert len(prompts) == 3
    assert prompts[0] + prompts[1] == prompts[2] == total


def test_answers_end_where_a_base_with_counted_positions_ends():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(LETTERS) + 1, n_positions=24, **sizes)).eval()
    tokenizer = tiny_tokenizer()
    pairs = [("a" * 20, "b"), ("a" * 3, "b" * 18), ("abc" * 5, "cab"), ("b" * 22, "c")]
    rows = [
        EncodedRow(tuple(tokenizer(p)["input_ids"]), tuple(tokenizer(a)["input_ids"]), ROWS[0])
        for p, a in pairs
    ]
    together = answers(model, tokenizer, rows)
    for row, said in zip(rows, together, strict=True):
        room = 24 - len(row.prompt)
        alone = said_alone(model, tokenizer, row, room)
        assert alone.startswith(said)
        assert len(said) >= min(len(row.answer), len(alone))
