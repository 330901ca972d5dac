"""The two forms of language models: one that goes on with a prompt, one that reads it first.

A causal model sees prompt and answer as one sequence; an encoder-decoder's encoder reads the
prompt, and its decoder says the answer. What differs between them in batches, losses, generation
and gates is here, and nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mole_vl import Masks, Mixture
from mole_vl.calls import Calls
from nlp.calls import TextCalls
from nlp.data import (
    IGNORED,
    EncodedRow,
    Style,
    TextBatch,
    TextRow,
    Tokenizer,
    check_lengths,
    collate,
    collate_prompts,
    encode_causal,
    encode_prompt,
    encode_rows,
    padded,
)

# What the attention to the encoder's states is called, and its layers that read them.
_CROSS = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention")
_READING = ("k", "v", "k_proj", "v_proj", "key", "value")


class Form(ABC):
    """How a model is shown prompts, and how it is asked for answers.

    Args:
        longest: The most positions that the model counts; None for no end.
    """

    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"]
    """peft's name of it."""
    calls: Calls | None = None
    """Reads what the model's calls tell of their rows; None where they tell too little."""

    def __init__(self, longest: int | None = None) -> None:
        self.longest = longest

    @abstractmethod
    def encode(self, row: TextRow, tokenizer: Tokenizer, style: Style) -> EncodedRow:
        """A row as token ids."""

    def encode_rows(
        self,
        rows: Sequence[TextRow],
        tokenizer: Tokenizer,
        *,
        style: Style = "plain",
        context: int = 1024,
        source: str = "rows",
    ) -> list[EncodedRow]:
        """Token ids of rows, as `nlp.data.encode_rows` makes them.

        Raises:
            ValueError: Rows longer than `context`, or than the model reads.
        """
        encoded = encode_rows(
            rows, tokenizer, style=style, context=context, encode=self.encode, source=source
        )
        if self.longest is not None:
            check_lengths(
                f"{source}: longer than the {self.longest} tokens that the base reads",
                encoded,
                [self.positions(row) for row in encoded],
                self.longest,
            )
        return encoded

    def encode_each(
        self,
        rows: Mapping[str, Sequence[TextRow]],
        tokenizer: Tokenizer,
        *,
        style: Style,
        context: int,
        source: str = "data of",
    ) -> dict[str, list[EncodedRow]]:
        """`encode_rows` of several lists, by the name that follows `source` in a message."""
        return {
            name: self.encode_rows(
                own, tokenizer, style=style, context=context, source=f"{source} {name}"
            )
            for name, own in rows.items()
        }

    @abstractmethod
    def positions(self, row: EncodedRow) -> int:
        """The most positions that the model counts in one sequence of this row."""

    @abstractmethod
    def room(self, new: int) -> int:
        """The most tokens that a prompt may have before `new` ones; for models with an end."""

    @abstractmethod
    def rows(self, rows: Sequence[EncodedRow], pad: int) -> TextBatch:
        """Prompts and answers side by side."""

    def scored(self, rows: Sequence[EncodedRow], pad: int) -> TextBatch:
        """As `rows`, for one forward that scores the answers: nothing is read that only ends them.

        So a row may be a token longer than the context.
        """
        return self.rows(rows, pad)

    @abstractmethod
    def prompts(self, rows: Sequence[EncodedRow], pad: int) -> TextBatch:
        """Prompts alone, as `generate` wants them; nothing is scored."""

    @abstractmethod
    def predictions(self, model: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Logits (B, S, V) and the ids that they are to predict, (B, S), IGNORED where none is.

        S are the positions that score something in any row: the head, dear with a big vocabulary,
        runs on these alone where that can be said.
        """

    @abstractmethod
    def said(self, ids: Tensor, batch: TextBatch) -> Tensor:
        """The new ids among those that `generate` returns."""

    @abstractmethod
    def streams(self, mixture: Mixture, batch: TextBatch) -> Mapping[str, Masks]:
        """Masks of the parts of the mixed model that read another sequence than `input_ids`."""


def fault_of_room(form: Form, new: int) -> str | None:
    """The fault of so many new tokens that no prompt has room before them, or None."""
    if form.longest is None or form.room(new) > 0:
        return None
    return (
        f"max_new_tokens is {new}, and the base reads {form.longest} tokens in all: a prompt needs "
        "some of them"
    )


class Causal(Form):
    """A model that goes on with its prompt."""

    task_type = "CAUSAL_LM"
    calls = TextCalls()

    def encode(self, row: TextRow, tokenizer: Tokenizer, style: Style) -> EncodedRow:
        """Prompt and answer as one text would be encoded."""
        return encode_causal(row, tokenizer, style)

    def positions(self, row: EncodedRow) -> int:
        """Prompt and answer are one sequence."""
        return len(row.prompt) + len(row.answer)

    def room(self, new: int) -> int:
        """What the new ones leave."""
        assert self.longest is not None
        return self.longest - new

    def rows(self, rows: Sequence[EncodedRow], pad: int) -> TextBatch:
        """Prompts and answers in one sequence, padded on the right."""
        return collate(rows, pad)

    def scored(self, rows: Sequence[EncodedRow], pad: int) -> TextBatch:
        """Without the last column, which predicts nothing; labels have it still."""
        batch = self.rows(rows, pad)
        return TextBatch(
            input_ids=batch["input_ids"][:, :-1],
            attention_mask=batch["attention_mask"][:, :-1],
            labels=batch["labels"],
            prompt_mask=batch["prompt_mask"][:, :-1],
        )

    def prompts(self, rows: Sequence[EncodedRow], pad: int) -> TextBatch:
        """Prompts alone, padded on the left."""
        return collate_prompts(rows, pad)

    def predictions(self, model: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Each position predicts the next one's id."""
        labels = batch["labels"][:, 1:]
        columns = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=columns,
            use_cache=False,
        ).logits
        return logits, labels[:, columns]

    def said(self, ids: Tensor, batch: TextBatch) -> Tensor:
        """What comes after the prompt."""
        return ids[:, batch["input_ids"].shape[1] :]

    def streams(self, mixture: Mixture, batch: TextBatch) -> Mapping[str, Masks]:
        """Blocks outside the language model, such as a vision tower's, read no text."""
        text = _decoder_path(mixture.model)
        prefix = f"{text}." if text else ""
        return {block: Masks() for block in mixture.layout.blocks if not block.startswith(prefix)}


class EncoderDecoder(Form):
    """A model whose encoder reads the prompt, and whose decoder says the answer.

    The prompt of its decoder is the token that it starts with: gates over rows read it there, where
    it has met the encoder's states, and hold for the answer.
    """

    task_type = "SEQ_2_SEQ_LM"

    def encode(self, row: TextRow, tokenizer: Tokenizer, style: Style) -> EncodedRow:
        """Prompt and answer as texts of their own, each as the tokenizer ends them."""
        answer = tokenizer(row.answer)["input_ids"]
        end = () if answer and answer[-1] == tokenizer.eos_token_id else (tokenizer.eos_token_id,)
        return EncodedRow(encode_prompt(row.prompt, tokenizer, style), (*answer, *end), row)

    def positions(self, row: EncodedRow) -> int:
        """Prompt and answer are two sequences."""
        return max(len(row.prompt), len(row.answer))

    def room(self, new: int) -> int:
        """As much as the encoder reads."""
        assert self.longest is not None
        return self.longest

    def rows(self, rows: Sequence[EncodedRow], pad: int) -> TextBatch:
        """Prompts in one sequence, answers in another, both padded on the right.

        Raises:
            ValueError: A row whose prompt is to be scored.
        """
        if any(row.inputs for row in rows):
            raise ValueError("an encoder reads the prompt, and nothing predicts it: score answers")
        batch = self.prompts(rows, pad)
        labels, _ = padded([row.answer for row in rows], IGNORED)
        return TextBatch(**{**batch, "labels": labels})

    def prompts(self, rows: Sequence[EncodedRow], pad: int) -> TextBatch:
        """Prompts alone, padded on the right."""
        ids, real = padded([row.prompt for row in rows], pad)
        labels = torch.full((len(rows), 1), IGNORED)
        return TextBatch(input_ids=ids, attention_mask=real.long(), labels=labels, prompt_mask=real)

    def predictions(self, model: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Each position of the decoder predicts its own label."""
        base: Any = model
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=base.prepare_decoder_input_ids_from_labels(batch["labels"]),
            use_cache=False,
        ).logits
        return logits, batch["labels"]

    def said(self, ids: Tensor, batch: TextBatch) -> Tensor:
        """All but the token that the decoder starts with."""
        return ids[:, 1:]

    def streams(self, mixture: Mixture, batch: TextBatch) -> Mapping[str, Masks]:
        """The decoder reads the answer; its attention to the encoder reads the prompt."""
        labels = batch["labels"]
        first = torch.zeros_like(labels, dtype=torch.bool)
        first[:, 0] = True
        # At the start `generate` runs the first position alone, and nothing is scored yet.
        scored = (labels != IGNORED) | first
        own = Masks(real=scored, pool=first)
        prompt = Masks(real=batch["attention_mask"].bool(), pool=batch["prompt_mask"])
        start = _decoder_path(mixture.model)
        crossing = {
            path: prompt
            for path in mixture.layers
            if path.startswith(f"{start}.")
            and path.rpartition(".")[2] in _READING
            and path.split(".")[-2] in _CROSS
        }
        return {start: own, **crossing}


def _decoder_path(model: Any) -> str:
    """Where the part of a model stands that says the answer."""
    decoder = model.get_decoder()
    return next(path for path, module in model.named_modules() if module is decoder)


def form_of(model: nn.Module) -> Form:
    """The form of a model of transformers, plain, under peft, or mixed."""
    config: Any = getattr(model, "config", None)
    kind = EncoderDecoder if getattr(config, "is_encoder_decoder", False) else Causal
    # Of a model that sees and reads, the part that reads; a T5 knows distances, and has no end.
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    return kind(getattr(text, "max_position_embeddings", None))
