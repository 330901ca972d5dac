"""Rows of text: read, encoded, and gathered into batches.

A row is a prompt, the answer that is wanted, and the name of its task (for reports, and for the
oracle; no model is shown it). On disk: JSON lines with these three keys.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, get_args

import torch
from torch import Tensor

from mole_vl.faults import one_of, refuse, some, told
from mole_vl.files import digest_contents, read_text

IGNORED = -100
"""The label of a position that is not scored."""
ROWS = "JSON lines of prompt, answer and task"
"""What a file of rows holds, for messages."""
OTHERWISE = (
    "other columns are put into words by {dataset: FILE, prompt: TEMPLATE, answer: TEMPLATE, "
    "task: NAME_OR_TEMPLATE} in the file's place"
)
"""What to give where rows are of another form, for messages."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer of transformers (whose own types say less)."""

    pad_token_id: int
    eos_token_id: int

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """The ids of one text, under `input_ids`."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """One conversation as the model was taught to see it."""
        ...

    def batch_decode(self, sequences: Any, *, skip_special_tokens: bool) -> list[str]:
        """The texts of a batch of ids."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Every token's id."""
        ...


@dataclass(frozen=True)
class TextRow:
    """One question and its answer."""

    prompt: str
    answer: str
    task: str


@dataclass(frozen=True)
class EncodedRow:
    """A row as token ids; the answer ends with the end-of-sequence token, as a rule.

    With `inputs` the prompt is scored too, all but its first token, which nothing predicts.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    row: TextRow
    inputs: bool = False


class _Rows(TypedDict):
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_mask: Tensor


class TextBatch(_Rows, total=False):
    """Rows side by side, of shape (B, T); an encoder-decoder's labels have a T of their own.

    `prompt_mask` is True on the real tokens of each prompt, False on answers and padding.
    `labels` are the ids of what is scored, the answer and its end, IGNORED elsewhere.
    `seeds`, (B,) int64, is there in training: what each row's dropout is drawn from.
    """

    seeds: Tensor


def read_rows(path: Path) -> list[TextRow]:
    """The rows of a JSON-lines file in UTF-8; blank lines are nothing.

    Raises:
        ValueError: The file is of another encoding; lines that are no rows, each by its number.
    """
    return parse_rows(read_text(Path(path)), str(path))


def parse_rows(text: str, where: str) -> list[TextRow]:
    """The rows of JSON lines; blank lines are nothing.

    Args:
        text: The lines.
        where: Where they are from, for messages.

    Raises:
        ValueError: No rows; lines that are none, by their numbers.
    """
    rows: list[TextRow] = []
    lines: dict[str, list[str]] = {}
    # Not `splitlines`: JSON's strings may hold what it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line))
        except ValueError as fault:
            lines.setdefault(str(fault), []).append(str(number))
    faults = [
        f"line{'s' if len(numbers) > 1 else ''} {some(numbers)}: {fault}"
        for fault, numbers in lines.items()
    ]
    if not rows and not faults:
        faults.append("the file is empty")
    refuse(where, told(faults))
    return rows


def _row(line: str) -> TextRow:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg})") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {type(found).__name__}")
    values = {}
    for key in ("prompt", "answer", "task"):
        if key not in found:
            names = ", ".join(sorted(found)) or "nothing"
            raise ValueError(f"no {key!r} (found {names}); {OTHERWISE}")
        if not isinstance(found[key], str) or not found[key].strip():
            raise ValueError(f"{key!r} is {found[key]!r}, expected some text")
        if not is_text(found[key]):
            raise ValueError(f"{key!r} is {found[key]!r}, which holds half a character")
        values[key] = found[key]
    return TextRow(**values)


def is_text(text: str) -> bool:
    """Whether a string can be written: a lone surrogate, half of a character, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def texts_of(setting: str, given: Any) -> list[str]:
    """One text or several as a list.

    Raises:
        ValueError: None, or what is no text.
    """
    texts = [given] if isinstance(given, str) else given
    texts = list(texts) if isinstance(texts, Iterable) else []
    if not texts or not all(isinstance(t, str) and t.strip() and is_text(t) for t in texts):
        raise ValueError(f"{setting}: {given!r}, expected some text, or several texts")
    return texts


def words_of(ids: Tensor, shown: Tensor, tokenizer: Tokenizer) -> list[str]:
    """The text of each row of ids, special tokens left out.

    Args:
        ids: (rows, positions).
        shown: The positions that count, (rows, positions), true or 1.
        tokenizer: Whose ids they are.
    """
    kept = [row[mask.bool()].tolist() for row, mask in zip(ids, shown, strict=True)]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)


def write_rows(path: Path, rows: Iterable[TextRow]) -> None:
    """Write rows as JSON lines."""
    Path(path).write_text(to_lines(rows), encoding="utf-8")


def digest_rows(rows: Iterable[TextRow]) -> str:
    """What `mole_vl.files.digest` says of the file that `write_rows` makes of these rows."""
    return digest_contents([to_lines(rows).encode()])


def to_lines(rows: Iterable[TextRow]) -> str:
    """Rows as the text of a JSON-lines file."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


Style = Literal["plain", "chat"]
"""How a prompt is put to a model: as it stands, or as the user's turn of its chat template."""


def encode_rows(
    rows: Sequence[TextRow],
    tokenizer: Tokenizer,
    *,
    style: Style = "plain",
    context: int = 1024,
    encode: Callable[[TextRow, Tokenizer, Style], EncodedRow] | None = None,
    source: str = "rows",
) -> list[EncodedRow]:
    """Token ids of rows.

    Args:
        rows: The rows.
        tokenizer: The model's.
        style: How prompts are put.
        context: The most tokens that a row may have.
        encode: How one row is encoded; as for a causal model if not given.
        source: Where the rows are from, for messages.

    Raises:
        ValueError: Rows longer than `context` tokens: all of them, each by its number from 0.
    """
    encoded = [(encode or encode_causal)(row, tokenizer, style) for row in rows]
    check_lengths(
        f"{source}: longer than the context of {context} tokens",
        encoded,
        [len(row.prompt) + len(row.answer) for row in encoded],
        context,
    )
    return encoded


def check_lengths(
    subject: str, rows: Sequence[EncodedRow], lengths: Sequence[int], most: int
) -> None:
    """Raise ValueError if rows have more tokens than `most`: all of them, each by its number."""
    faults = [
        f"row {number} ({row.row.prompt[:40]!r}) has {length} tokens"
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True))
        if length > most
    ]
    if faults:
        refuse(subject, [*told(faults), "shorten these rows or leave them out"])


def encode_causal(row: TextRow, tokenizer: Tokenizer, style: Style) -> EncodedRow:
    """A row for a model that goes on with its prompt."""
    answer = row.answer if style == "chat" else f" {row.answer}"
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    prompt = encode_prompt(row.prompt, tokenizer, style)
    return EncodedRow(prompt, (*ids, tokenizer.eos_token_id), row)


def encode_prompt(prompt: str, tokenizer: Tokenizer, style: Style) -> tuple[int, ...]:
    """A prompt as it stands, or as the user's turn of the chat template, up to the answer.

    Raises:
        ValueError: Another style, or a chat with a tokenizer that has no template for it.
    """
    refuse("encode", [one_of("style", style, get_args(Style))])
    if style == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "style is 'chat', and the tokenizer has no chat template: take style 'plain', or a "
            "base that was taught conversations"
        )
    if style == "plain":
        return tuple(tokenizer(prompt)["input_ids"])
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Ids side by side, padded on the right, and which of them are no padding; both (B, T)."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), fill)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        real[index, : len(row)] = True
    return ids, real


def collate(rows: Sequence[EncodedRow], pad: int) -> TextBatch:
    """Prompts and answers in one sequence, padded on the right with the id `pad`."""
    ids, real = padded([row.prompt + row.answer for row in rows], pad)
    labels, _ = padded([_labels(row) for row in rows], IGNORED)
    lengths = torch.tensor([len(row.prompt) for row in rows])
    prompt_mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return TextBatch(
        input_ids=ids, attention_mask=real.long(), labels=labels, prompt_mask=prompt_mask
    )


def _labels(row: EncodedRow) -> tuple[int, ...]:
    ignored = min(1, len(row.prompt)) if row.inputs else len(row.prompt)
    return (IGNORED,) * ignored + (row.prompt + row.answer)[ignored:]


def collate_prompts(rows: Sequence[EncodedRow], pad: int) -> TextBatch:
    """Prompts alone, padded on the left as `generate` wants them; nothing is scored."""
    length = max(len(row.prompt) for row in rows)
    ids = torch.full((len(rows), length), pad)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, length - len(row.prompt) :] = torch.tensor(row.prompt)
        real[index, length - len(row.prompt) :] = True
    labels = torch.full((len(rows), length), IGNORED)
    return TextBatch(input_ids=ids, attention_mask=real.long(), labels=labels, prompt_mask=real)


def to_device(batch: TextBatch, device: torch.device) -> TextBatch:
    """The same batch on `device`."""
    return TextBatch(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        labels=batch["labels"].to(device),
        prompt_mask=batch["prompt_mask"].to(device),
    )
