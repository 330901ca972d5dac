import json
from dataclasses import replace

import pytest
import torch

from nlp.data import IGNORED, TextRow, collate, collate_prompts, encode_rows, read_rows, write_rows
from nlp.forms import Causal, EncoderDecoder, form_of
from tests.nlp.families import seq2seq
from tests.nlp.toys import ROWS, tiny_model, tiny_tokenizer


def encoded():
    return encode_rows(ROWS, tiny_tokenizer())


def test_rows_survive_the_disk(tmp_path):
    rows = [*ROWS, TextRow("5 in German:", "fünf", "german")]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_blank_lines_are_nothing_and_a_string_may_hold_an_end_of_line(tmp_path):
    rows = [ROWS[0], TextRow("one\u2028two", "three", "t")]
    write_rows(tmp_path / "rows.jsonl", rows)
    text = (tmp_path / "rows.jsonl").read_text().replace("}\n", "}\n \n\r\n")
    (tmp_path / "rows.jsonl").write_text(text)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="the file is empty"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"prompt": "p", "answer": "", "task": "t"}', "'answer' is '', expected some text"),
        ('{"prompt": "p", "task": "t"}', r"no 'answer' \(found prompt, task\)"),
        ('{"prompt": 3, "answer": "a", "task": "t"}', "'prompt' is 3"),
        ("[1]", "expected an object, found list"),
        ("{oops", "no JSON"),
        (r'{"prompt": "\ud800", "answer": "a", "task": "t"}', "'prompt' is .* half a character"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, fault):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "a", "task": "t"}) + f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl: line 2: {fault}"):
        read_rows(path)


def test_all_bad_rows_are_reported_together_and_no_rows_is_a_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n[]\n")
    with pytest.raises(ValueError, match=r"line 1: no 'prompt'.*line 2: expected an object"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        read_rows(path)


def test_prompts_are_scored_where_they_are_learned_all_but_their_first_token():
    one, other = (replace(r, inputs=i) for r, i in zip(encoded()[:2], (True, False), strict=True))
    batch = collate([one, other, replace(one, prompt=())], 0)
    length = batch["labels"].shape[1]

    def row(*ids):
        return [*ids, *[IGNORED] * (length - len(ids))]

    assert batch["labels"].tolist() == [
        row(IGNORED, *one.prompt[1:], *one.answer),
        row(*[IGNORED] * len(other.prompt), *other.answer),
        row(*one.answer),
    ]
    with pytest.raises(ValueError, match="nothing predicts it"):
        EncoderDecoder().rows([other, one], 0)


def test_rows_are_utf8_and_a_mark_of_it_is_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [TextRow("5 in German:", "fünf", "german")]
    write_rows(path, rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(path) == rows
    path.write_bytes(path.read_text(encoding="utf-8-sig").encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows.jsonl: no UTF-8 text .*; save it as UTF-8"):
        read_rows(path)


def test_more_bad_lines_than_are_shown_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": {number}}}' for number in range(1, 13)]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 10: 'prompt' is 10, expected .*; and 2 more$"):
        read_rows(path)


def test_lines_with_one_fault_are_named_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[]\n" * 2 + "oops\n" + "[]\n" * 10)
    with pytest.raises(
        ValueError,
        match=r"jsonl: lines 1, 2, 4 and 9 more: expected an object, found list; line 3: no JSON",
    ):
        read_rows(path)


def test_a_row_longer_than_the_context_is_named_with_its_length():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"context of 20 .*row 1 \('Past tense of go:'\) has 23"):
        encode_rows(ROWS, tokenizer, context=20)
    assert encode_rows(ROWS, tokenizer, context=23)


def test_a_row_longer_than_the_base_reads_is_named_with_its_source():
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        ValueError,
        match=r"^train: longer than the 20 tokens that the base reads: row 1 .* 23 t",
    ):
        Causal(20).encode_rows(ROWS, tokenizer, source="train")
    # Prompt (17) and answer (5) are sequences of their own there.
    assert EncoderDecoder(20).encode_rows(ROWS, tokenizer)
    with pytest.raises(ValueError, match=r"the 10 tokens .* row 0 .* has 14 tokens; "):
        EncoderDecoder(10).encode_rows(ROWS[:1], tokenizer)
    assert (form_of(tiny_model()).longest, form_of(seq2seq("t5")).longest) == (128, None)


@pytest.mark.parametrize(
    ("style", "prompt", "answer"),
    [
        ("plain", "Plural of cat:", " cats[end]"),
        ("chat", "<user>Plural of cat:<answer>", "cats[end]"),
    ],
)
def test_a_row_is_its_prompt_then_its_answer_and_the_end(style, prompt, answer):
    tokenizer = tiny_tokenizer()
    row = encode_rows(ROWS[:1], tokenizer, style=style)[0]
    assert tokenizer.decode(row.prompt) == prompt
    assert tokenizer.decode(row.answer) == answer


def test_a_style_that_the_tokenizer_does_not_know_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="style is None, expected one of plain, chat"):
        encode_rows(ROWS, tokenizer, style=None)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="style is 'chat', and the tokenizer has no chat template"):
        encode_rows(ROWS, tokenizer, style="chat")


def test_labels_cover_answer_and_end_and_the_prompt_mask_covers_the_prompt():
    tokenizer = tiny_tokenizer()
    rows = encode_rows(ROWS, tokenizer)
    batch = collate(rows, tokenizer.pad_token_id)
    for index, row in enumerate(rows):
        ids, labels = batch["input_ids"][index], batch["labels"][index]
        prompt, real = batch["prompt_mask"][index], batch["attention_mask"][index].bool()
        assert ids[prompt].tolist() == list(row.prompt)
        assert labels[labels != IGNORED].tolist() == list(row.answer)
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
        # Every real position is prompt or scored, never both; padding lies on the right.
        assert torch.equal(prompt ^ (labels != IGNORED), real)
        assert real.int().diff().max() <= 0


def test_prompts_alone_end_together_and_score_nothing():
    tokenizer = tiny_tokenizer()
    rows = encode_rows(ROWS, tokenizer)
    batch = collate_prompts(rows, tokenizer.pad_token_id)
    assert batch["attention_mask"][:, -1].all()
    assert torch.equal(batch["prompt_mask"], batch["attention_mask"].bool())
    assert (batch["labels"] == IGNORED).all()
    for index, row in enumerate(rows):
        assert batch["input_ids"][index][batch["prompt_mask"][index]].tolist() == list(row.prompt)
