"""Questions as a model reads them."""

from dataclasses import replace

import pytest

from nlp.data import IGNORED, TextRow, collate
from nlp.scienceqa.encoding import cut_prompts, cut_texts, encode
from tests.nlp.scienceqa_place import place as place  # place is a fixture
from tests.nlp.scienceqa_toys import (
    tokenizer,
)
from tests.nlp.test_task_moe import wandb as wandb  # a fixture


def test_the_answer_follows_the_prompt_at_once_as_one_text_would():
    fast = tokenizer()
    row = TextRow("### Response:\n", "Answer: The answer is A.", "t")
    whole = fast(row.prompt + row.answer)["input_ids"]
    found = encode(row, fast, inputs=False, end=True)
    assert [*found.prompt, *found.answer] == [*whole, 1]
    assert list(found.prompt) == fast(row.prompt)["input_ids"] and found.prompt[0] == 0
    assert encode(row, fast, inputs=True, end=False).answer == found.answer[:-1]
    labels = collate([encode(row, fast, inputs=True, end=True), found], 1)["labels"].tolist()
    assert labels[0] == [IGNORED, *whole[1:], 1]
    assert labels[1] == [IGNORED] * len(found.prompt) + list(found.answer)
    text = encode(TextRow("", "rock milk", "t"), fast, inputs=True, end=True)
    assert [*text.prompt, *text.answer] == [*fast("rock milk")["input_ids"], 1]
    assert text.prompt == (0,)


def test_a_token_across_the_prompts_end_is_none_that_generation_would_meet():
    fast = tokenizer(begin=False)
    merged = TextRow("### Resp", "onse:", "t")
    whole = fast("### Response:")["input_ids"]
    found = encode(merged, fast, inputs=False, end=False)
    assert whole[: len(found.prompt)] != list(found.prompt)
    assert list(found.prompt) == fast("### Resp")["input_ids"]
    assert fast.decode([*found.prompt, *found.answer]) == "### Response:"


def test_long_rows_keep_their_answers_and_the_prompts_end():
    fast = tokenizer()
    rows = [
        encode(TextRow("milk " * n, "rock.", "t"), fast, inputs=False, end=True) for n in (1, 9)
    ]
    cut = cut_prompts(rows, 12, begin=0)
    assert cut[0] == rows[0]
    assert cut[1].answer == rows[1].answer and len(cut[1].prompt + cut[1].answer) == 12
    room = 12 - len(rows[1].answer)
    assert cut[1].prompt == (0, *rows[1].prompt[-room + 1 :])
    assert cut_prompts(rows, 12, begin=None)[1].prompt == rows[1].prompt[-room:]
    with pytest.raises(
        ValueError, match=r"room for a prompt within 2 tokens: row 0 .'rock\.'. has"
    ):
        cut_prompts(rows, 2, begin=0)


def test_long_texts_keep_their_beginning():
    fast = tokenizer()
    one, more = (encode(TextRow("", "rock " * n, "t"), fast, inputs=True, end=True) for n in (1, 9))
    assert cut_texts([one, more], 12) == [one, replace(more, answer=more.answer[:11])]
