"""Language models, mixed or plain, as lm-eval takes them (EleutherAI's evaluation harness).

lm_eval.simple_evaluate(model=HarnessModel(model, tokenizer), tasks=["arc_easy"])
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mole_vl import Mixture
from nlp.adapter import bound
from nlp.around import Around, ExtraTerms, alone
from nlp.data import IGNORED, EncodedRow, TextBatch, TextRow, Tokenizer, to_device
from nlp.forms import form_of

# The two texts (None for a window of a longer one), the context's ids, the continuation's.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# A context, and a continuation but for its last token: what one row of a forward reads.
Shown = tuple[tuple[int, ...], tuple[int, ...]]

_LOG = logging.getLogger(__name__)
_UNNAMED = TextRow("", "", "")
# The decorator that registers it hides its type from a checker.
_HFLM: Any = HFLM


class HarnessModel(_HFLM):
    """A language model of transformers for `lm_eval.simple_evaluate(model=...)`.

    lm-eval's own HFLM shows a model contexts and continuations in one forward, without masks: gates
    over rows would read the very continuation that is judged, and the padding. Here the mixture is
    told each row's context (worked examples and all), and such gates read that alone. Contexts of
    the mixture, such as `masked` or `pinned`, hold for an evaluation inside them.

    Args:
        model: Causal or encoder-decoder; in eval mode from then on. Whether it is mixed, is seen
            when it is asked.
        tokenizer: Its tokenizer, with a pad token.
        batch_rows: Rows in one forward.
        max_length: The most tokens that the model reads; what its config says if not given.
        around: Entered around every forward and `generate`; if not given a mixture is told of each
            batch (`nlp.adapter.bound`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        batch_rows: int = 8,
        max_length: int | None = None,
        around: Around | None = None,
    ) -> None:
        # HFLM would tie a model's weights anew, which an output layer that carries experts refuses.
        described = SimpleNamespace(device=model.device, config=model.config)
        with _without_warnings(HFLM.__module__):
            super().__init__(
                pretrained=described,
                tokenizer=tokenizer,
                batch_size=batch_rows,
                max_length=max_length,
            )
        self._model = model.eval()
        self._form = form_of(model)
        self._given = around

    def _around(self, batch: TextBatch) -> AbstractContextManager[ExtraTerms]:
        if self._given is not None:
            return self._given(batch)
        mixture = getattr(self.model, "mixture", None)
        if not isinstance(mixture, Mixture) or mixture.baked:
            return alone(batch)
        return bound(mixture)(batch)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether it is the greedy one.

        Raises:
            ValueError: A continuation without tokens, or longer than the model's context.
        """
        places: dict[Shown, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(self._shown(request), []).append(place)
        cut = sum(len(requests[p][1]) > len(shown[0]) for shown in places for p in places[shown])
        if cut:
            _LOG.warning(
                "%d of %d contexts are longer than the model's %d tokens allow: their beginnings "
                "are left out", cut, len(requests), self.max_length,
            )  # fmt: skip
        longest_first = sorted(places, key=lambda ids: -len(ids[0]) - len(ids[1]))
        found = [(0.0, False)] * len(requests)
        size = override_bs or self.batch_size
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as progress:
            for start in range(0, len(longest_first), size):
                batch = longest_first[start : start + size]
                # Of the requests that share a row, any one's last token does: it is never read.
                last = [requests[places[shown][0]][2][-1] for shown in batch]
                for shown, logits in zip(batch, self._logits(batch, last), strict=True):
                    for place in places[shown]:
                        texts, _, continuation = requests[place]
                        found[place] = _judged(logits, continuation)
                        if texts is not None:
                            self.cache_hook.add_partial("loglikelihood", texts, found[place])
                    progress.update(len(places[shown]))
        return found

    def _shown(self, request: Request) -> Shown:
        """What a row reads; of a context that is too long, the end.

        HFLM lets rows of the same ids serve each other wherever their contexts end. A gate that
        reads the context tells them apart.
        """
        texts, context, continuation = request
        if not 0 < len(continuation) <= self.max_length:
            named = f" ({texts[1][:40]!r})" if texts else ""
            raise ValueError(
                f"a continuation{named} has {len(continuation)} tokens, expected 1 to "
                f"{self.max_length}, the model's context"
            )
        beside = len(continuation) - 1 if self.backend == "causal" else 0
        return tuple(context[-(self.max_length - beside) :]), tuple(continuation[:-1])

    @torch.no_grad()
    def _logits(self, batch: Sequence[Shown], last: Sequence[int]) -> Iterator[Tensor]:
        """For each row the logits of its continuation's tokens, (tokens, vocabulary)."""
        rows = [
            EncodedRow(context, (*read, token), _UNNAMED)
            for (context, read), token in zip(batch, last, strict=True)
        ]
        told = to_device(self._form.scored(rows, self.tokenizer.pad_token_id), self.model.device)
        with self._around(told):
            logits, labels = self._form.predictions(self.model, told)
        return (row[ids != IGNORED] for row, ids in zip(logits, labels, strict=True))

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generate: Any
    ) -> Tensor:
        """What is said to contexts, as HFLM expects it: a causal model's ids begin with them."""
        real = generate.pop("attention_mask").bool()
        prompts = [tuple(ids[mask].tolist()) for ids, mask in zip(context, real, strict=True)]
        rows = [EncodedRow(prompt, (), _UNNAMED) for prompt in prompts]
        batch = to_device(self._form.prompts(rows, self.tokenizer.pad_token_id), self.model.device)
        generate["attention_mask"] = batch["attention_mask"]
        with self._around(batch):
            if self.backend == "causal":
                return super()._model_generate(batch["input_ids"], max_length, stop, **generate)
            # HFLM counts the contexts in, and a decoder begins with a token of its own.
            decoded = max_length - context.shape[1] + 1
            ids = super()._model_generate(batch["input_ids"], decoded, stop, **generate)
            return self._form.said(ids, batch)


def _judged(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    ids = torch.tensor(continuation, device=logits.device)
    chances = logits.float().log_softmax(-1).gather(1, ids[:, None])
    return chances.sum().item(), bool((logits.argmax(-1) == ids).all())


@contextmanager
def _without_warnings(logger: str) -> Iterator[None]:
    """HFLM warns whoever hands it a model of options that are not given here."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)
