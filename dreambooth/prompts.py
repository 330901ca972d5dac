"""Prompts as a UNet reads them, and the text encoders that make them so."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mole_vl.faults import refuse


@dataclass(frozen=True)
class Prompts:
    """B encoded prompts: `states` (B, L, D), and SDXL's `pooled` (B, P)."""

    states: Tensor
    pooled: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.states.device

    def to(self, device: torch.device) -> "Prompts":
        """The same elsewhere."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return Prompts(self.states.to(device), pooled)

    def repeat_interleave(self, times: int, dim: int = 0) -> "Prompts":
        """Each prompt `times` times, as torch's of a tensor; `dim` is that of the prompts."""
        if dim != 0:
            raise ValueError(f"dim is {dim}, expected 0: that of the prompts")
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(times, 0)
        return Prompts(self.states.repeat_interleave(times, 0), pooled)

    def __getitem__(self, rows: slice) -> "Prompts":
        """Some of them."""
        return Prompts(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def __len__(self) -> int:
        return len(self.states)


def side_by_side(prompts: Sequence[Prompts]) -> Prompts:
    """The first of each, then the second of each: [negative; positive] of several pictures."""
    states = torch.stack([one.states for one in prompts], 1).flatten(0, 1)
    pooled = [one.pooled for one in prompts if one.pooled is not None]
    return Prompts(states, torch.stack(pooled, 1).flatten(0, 1) if pooled else None)


@dataclass(frozen=True)
class Reader:
    """A text encoder with its tokenizer; L is the tokenizer's fixed length.

    Args:
        tokenizer: Prompts to token ids.
        encoder: Token ids (B, L) to states (B, L, D).
    """

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel | CLIPTextModelWithProjection

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Padded token ids (B, L), on the encoder's device.

        Raises:
            ValueError: Prompts of more than L tokens.
        """
        ids = self.tokenizer(list(prompts)).input_ids
        length = self.tokenizer.model_max_length
        refuse(
            "prompts",
            [
                f"{shorten(prompt, 60)!r} has {len(row)} tokens, expected at most {length}"
                for prompt, row in zip(prompts, ids, strict=True)
                if len(row) > length
            ],
        )
        padded = self.tokenizer.pad(
            {"input_ids": ids}, padding="max_length", max_length=length, return_tensors="pt"
        )
        return padded["input_ids"].to(self.encoder.device)

    def real(self, prompts: Sequence[str]) -> Tensor:
        """Positions that are no padding, (B, L) bool."""
        end: Any = self.tokenizer.eos_token_id
        return real_tokens(self.ids(prompts), end)

    def last(self, prompts: Sequence[str]) -> Tensor:
        """The last layer's states, normalised: what SD 1.x and 2.x read."""
        return self.encoder(self.ids(prompts)).last_hidden_state

    def penultimate(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """The states before the last layer, and the projected summary, if any: SDXL's."""
        found = self.encoder(self.ids(prompts), output_hidden_states=True)
        return found.hidden_states[-2], getattr(found, "text_embeds", None)


def real_tokens(ids: Tensor, end: int) -> Tensor:
    """Positions up to the first end token of a row, (rows, positions) bool: the rest is padding.

    Tokenizers of CLIP pad with the end token itself or with another; a row without end is all real.
    """
    return ((ids == end).long().cumsum(-1) - (ids == end).long()) == 0


def read_by_two(first: Reader, second: Reader, prompts: Sequence[str]) -> Prompts:
    """SDXL's reading: both encoders' states side by side, and the second's summary."""
    one, _ = first.penultimate(prompts)
    two, pooled = second.penultimate(prompts)
    return Prompts(torch.cat([one, two], -1), pooled)
