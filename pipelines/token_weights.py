"""The weights of an answer, by site, token and expert."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mole_vl.bank import spread
from mole_vl.faults import one_of, refuse
from mole_vl.passes import Record
from mole_vl.plans import in_order
from nlp.adapter import bound
from nlp.data import EncodedRow, Tokenizer, to_device
from nlp.forms import form_of
from nlp.task import answer_losses


@dataclass(frozen=True)
class TokenWeights:
    """An answer, and what each expert weighed where the model read each token.

    A token's weights are those with which the next one is predicted. Gates over rows have the same
    for all tokens of a row.

    Args:
        text: The answer.
        tokens: Texts of the tokens of prompt and answer, the end token included.
        prompt: How many of them are the prompt's.
        sites: Names of the sites, as the model runs them.
        experts: Names of the experts.
        weights: As the layers applied them, strength included, (sites, tokens, experts).
    """

    text: str
    tokens: tuple[str, ...]
    prompt: int
    sites: tuple[str, ...]
    experts: tuple[str, ...]
    weights: Tensor

    def table(self, site: str | None = None) -> str:
        """Weights by token and expert, in Markdown: of one site, or the mean over all.

        Raises:
            ValueError: There is no such site.
        """
        if site is not None:
            refuse("table", [one_of("site", site, self.sites)])
        picked = self.weights.mean(0) if site is None else self.weights[self.sites.index(site)]
        lines = [f"| token | {' | '.join(self.experts)} |", "|---" * (len(self.experts) + 1) + "|"]
        lines += [
            f"| {token!r} | {' | '.join(f'{weight:.3f}' for weight in weights)} |"
            for token, weights in zip(self.tokens, picked.tolist(), strict=True)
        ]
        return "\n".join(lines)


def with_answers(
    rows: Sequence[EncodedRow], said: Tensor, ends: int | Sequence[int] | None, pad: int
) -> list[EncodedRow]:
    """The rows with what was answered, each answer with its end token and no padding behind it.

    Args:
        rows: The prompts.
        said: Ids of the answers, (answers, positions); of several for each prompt, one prompt's
            after another's.
        ends: The ids that end an answer.
        pad: The id of padding.
    """
    ending = {ends} if isinstance(ends, int) else set(ends or ())
    copies = len(said) // len(rows)
    return [
        EncodedRow(rows[place // copies].prompt, _kept(ids, ending, pad), rows[place // copies].row)
        for place, ids in enumerate(said.tolist())
    ]


def _kept(ids: Sequence[int], ends: Set[int], pad: int) -> tuple[int, ...]:
    for place, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: place + 1])
    # What else ends an answer, such as a stop string, leaves no token of its own.
    kept = list(ids)
    while kept and kept[-1] == pad:
        kept.pop()
    return tuple(kept)


def traced(
    model: PreTrainedModel, tokenizer: Tokenizer, rows: Sequence[EncodedRow], texts: Sequence[str]
) -> list[TokenWeights]:
    """The weights where each token of each row is read, in one forward of the whole rows.

    Args:
        model: A mixed causal model.
        tokenizer: Its tokenizer.
        rows: Prompts and answers.
        texts: The answers, in words.
    """
    mixture: Any = model.mixture
    batch = to_device(form_of(model).rows(rows, tokenizer.pad_token_id), model.device)
    with mixture.record() as records, bound(mixture)(batch):
        answer_losses(model, batch)
    found = by_token(records, len(mixture.names), *batch["input_ids"].shape)
    told = []
    for row, text, weights in zip(rows, texts, found, strict=True):
        ids = [*row.prompt, *row.answer]
        tokens = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False)
        told.append(
            TokenWeights(
                text=text,
                tokens=tuple(tokens),
                prompt=len(row.prompt),
                sites=tuple(record.site for record in records),
                experts=mixture.names,
                weights=weights[:, : len(ids)],
            )
        )
    return told


def by_token(records: Sequence[Record], experts: int, rows: int, positions: int) -> Tensor:
    """The weights of one forward, (rows, sites, positions, E), whatever each gate's vary over."""
    found = []
    for record in records:
        weights = in_order(record.output.weights, record.output.experts, experts)
        weights = weights.float() * record.strength
        if weights.dim() > 1:
            weights = spread(weights, rows)
        if weights.dim() == 2:
            weights = weights.unsqueeze(1)
        found.append(weights.expand(rows, positions, experts))
    return torch.stack(found, dim=1).cpu()
