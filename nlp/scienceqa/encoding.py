"""Instructions and texts as token ids, none longer than may be."""

from collections.abc import Sequence
from dataclasses import replace

from mole_vl.faults import refuse, told
from nlp.data import EncodedRow, TextRow, Tokenizer


def encode(row: TextRow, tokenizer: Tokenizer, *, inputs: bool, end: bool) -> EncodedRow:
    """A prompt with the answer that follows it at once.

    Args:
        row: The prompt and the answer; without a prompt the answer's first token is one.
        tokenizer: The model's.
        inputs: Whether the prompt is learned too.
        end: Whether the end of the answer is.
    """
    last = (tokenizer.eos_token_id,) if end else ()
    whole = tuple(tokenizer(row.prompt + row.answer)["input_ids"])
    if not row.prompt:
        return EncodedRow(whole[:1], (*whole[1:], *last), row, inputs)
    prompt = tuple(tokenizer(row.prompt)["input_ids"])
    if whole[: len(prompt)] == prompt:
        return EncodedRow(prompt, (*whole[len(prompt) :], *last), row, inputs)
    # Where a token would hold the prompt's end and the answer's beginning: generation knows none.
    answer = tokenizer(row.answer, add_special_tokens=False)["input_ids"]
    return EncodedRow(prompt, (*answer, *last), row, inputs)


def cut_prompts(rows: Sequence[EncodedRow], most: int, begin: int | None) -> list[EncodedRow]:
    """Rows of at most so many tokens: what is too much goes from the prompt's beginning.

    Args:
        rows: The rows.
        most: Tokens of prompt and answer.
        begin: The id that a prompt may begin with and keeps, if the tokenizer has one.

    Raises:
        ValueError: Rows whose answer leaves no room for a token of the prompt, each by its number.
    """
    refuse(
        f"answers that leave no room for a prompt within {most} tokens",
        told(
            [
                f"row {number} ({row.row.answer[:40]!r}) has {len(row.answer)} tokens"
                for number, row in enumerate(rows)
                if len(row.answer) >= most
            ]
        ),
    )
    return [_cut(row, most - len(row.answer), begin) for row in rows]


def _cut(row: EncodedRow, room: int, begin: int | None) -> EncodedRow:
    if len(row.prompt) <= room:
        return row
    kept = 1 if room > 1 and row.prompt[0] == begin else 0
    prompt = row.prompt[:kept] + row.prompt[len(row.prompt) - room + kept :]
    return replace(row, prompt=prompt)


def cut_texts(rows: Sequence[EncodedRow], most: int) -> list[EncodedRow]:
    """Texts, whose prompt is one token, of at most so many: what is too much goes from the end."""
    return [replace(row, answer=row.answer[: most - len(row.prompt)]) for row in rows]
