"""One call of a pipeline: what each forward of its mixed parts is told."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.adapter import positive_rows
from dreambooth.prompts import real_tokens
from mole_vl import Mixture
from mole_vl.faults import refuse
from pipelines.forwards import around_forwards
from pipelines.options import Options
from pipelines.parts import PARTS
from pipelines.schedules import FIRST, Step, at
from pipelines.weights import (
    check_known,
    check_weights,
    of_prompts,
    weights_at,
)


class Drawing:
    """One call of a pipeline.

    Args:
        pipe: A pipeline with mixed parts.
        options: How it mixes.
        prompts: How many it reads.
        copies: Pictures of each.
        scale: Multiplies the strength.

    Raises:
        ValueError: Options that do not fit the experts or the number of pictures.
    """

    def __init__(
        self, pipe: Any, options: Options, prompts: int = 1, copies: int = 1, scale: float = 1.0
    ) -> None:
        self.pipe = pipe
        self.options = options
        self.scale = scale
        self.names: tuple[str, ...] = pipe.experts
        self.prompts, self.copies = prompts, copies
        self.parts: Mapping[str, Mixture] = {
            part: mixture for part, mixture in pipe.mixtures.items() if not mixture.baked
        }
        masked = options.masked
        self.masked = (masked,) if isinstance(masked, str) else tuple(masked)
        check_known(self.names, self.masked, "masked")
        left = [name for name in self.names if name not in self.masked]
        refuse("masked", [None if left else "no expert is left; strength=0 draws the base alone"])
        if options.weights is not None:
            check_weights(options.weights, self.names, prompts * copies)
        self._calls = 0
        self._others: list[int] = []
        self._inner = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context for the pipeline's own `__call__`. A drawing of another thread waits."""
        with ExitStack() as stack:
            for mixture in self.parts.values():
                # This holds the mixture until the pictures are done.
                stack.enter_context(mixture.scaled(self.scale))
                stack.enter_context(self._mask(mixture))
            if "unet" in self.parts:
                unet = self.parts["unet"].model
                stack.enter_context(around_forwards(unet, self._unet))
                average = unet.register_forward_hook(self._averaged, with_kwargs=True)
                stack.callback(average.remove)
            yield

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """A context for the pipeline's own `encode_prompt`."""
        with ExitStack() as stack:
            for part, mixture in self.parts.items():
                if part == "unet":
                    continue
                end = getattr(self.pipe, PARTS[part] or "").eos_token_id
                stack.enter_context(
                    around_forwards(mixture.model, self._text_encoder(mixture, end))
                )
            yield

    def _mask(self, mixture: Mixture) -> AbstractContextManager[None]:
        masked = [name for name in mixture.names if name in self.masked]
        if len(masked) == len(mixture.names):
            return mixture.disabled()
        return mixture.masked(masked) if masked else nullcontext()

    def _given(self, step: Step, mixture: Mixture) -> Tensor | None:
        """The weights given for a part's experts, the masked at zero."""
        if self.options.weights is None:
            return None
        pictures = self.prompts * self.copies
        weights = weights_at(self.options.weights, step, self.names, pictures)
        kept = torch.tensor([float(name not in self.masked) for name in self.names])
        return (weights * kept)[..., [self.names.index(name) for name in mixture.names]]

    def _text_encoder(self, mixture: Mixture, end: int) -> Any:
        def contexts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
            ids = args[0] if args else kwargs["input_ids"]
            yield mixture.scaled(at(self.options.strength, FIRST))
            yield mixture.condition(real=real_tokens(ids, end))
            weights = self._given(FIRST, mixture)
            if weights is not None:
                yield mixture.pinned(of_prompts(weights, self.copies))

        return contexts

    def _unet(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        mixture = self.parts["unet"]
        sample: Tensor = args[0] if args else kwargs["sample"]
        guided = self.pipe.do_classifier_free_guidance
        if self._inner:
            self._calls -= 1
        step = Step(index=self._calls, count=max(self._calls + 1, self.pipe.num_timesteps))
        self._calls += 1
        yield mixture.scaled(at(self.options.strength, step))
        weights = self._alone(step, sample.shape[0])
        if weights is None:
            weights = self._given(step, mixture)
            if weights is not None and weights.dim() == 2 and guided:
                weights = weights.repeat(2, 1)
        if weights is not None:
            yield mixture.pinned(weights)
        elif guided and self.options.guidance == "shared":
            yield mixture.condition(source=positive_rows(sample.shape[0] // 2, sample.device))

    def _alone(self, step: Step, rows: int) -> Tensor | None:
        """One-hot weights (rows, E) where experts draw alone; the next ones wait in `_others`."""
        if self.options.mixing is None:
            return None
        names = self.parts["unet"].names
        kept = [index for index, name in enumerate(names) if name not in self.masked]
        if not kept:
            return None
        if self._inner:
            turn = self._others
        else:
            first, *self._others = [kept[i] for i in self.options.mixing.alone(step, len(kept))]
            turn = [first]
        return torch.eye(len(names))[turn].repeat_interleave(rows // len(turn), 0)

    def _averaged(self, unet: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The mean prediction where several experts draw alone: the others', in one batch, joined.

        Guidance is linear, so that the guided mean is the mean of the guided predictions.
        """
        if self._inner or not self._others:
            return output
        rows, times = output[0].shape[0], len(self._others)
        self._inner = True
        try:
            more = unet(*_repeated(args, rows, times), **_repeated(kwargs, rows, times))
        finally:
            self._inner = False
        both = torch.cat([output[0], more[0]])
        return (both.unflatten(0, (times + 1, rows)).mean(0), *output[1:])


def _repeated(value: Any, rows: int, times: int) -> Any:
    """Arguments for `times` as many rows: every tensor of `rows` rows, repeated as a whole."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows:
        return value.repeat(times, *[1] * (value.dim() - 1))
    if isinstance(value, Mapping):
        # What attention processors are told is theirs: masks of IP-Adapters have rows of their own.
        return {
            k: v if k == "cross_attention_kwargs" else _repeated(v, rows, times)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_repeated(v, rows, times) for v in value)
    return value
