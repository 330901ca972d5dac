"""The mixin that makes a diffusers pipeline one that mixes LoRAs."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

from dreambooth.adapter import Negatives
from mole_vl.arms import together
from pipelines.composition import Composition
from pipelines.drawing import Drawing
from pipelines.keeping import Kept
from pipelines.options import Options
from pipelines.recording import Recording
from pipelines.schedules import Schedule
from pipelines.weights import WeightSchedule

# What the pipelines take beyond their signature; they swallow anything else without a word.
_UNNAMED = {"callback", "callback_steps"}


class Mixed(Kept):
    """LoRAs mixed by gates in a diffusers pipeline: stands before the pipeline's own class."""

    _drawing: Drawing | None = None

    def __call__(
        self,
        *args: Any,
        strength: Schedule[float] = 1.0,
        masked: Sequence[str] = (),
        weights: WeightSchedule | None = None,
        mixing: Composition | None = None,
        guidance: Negatives = "shared",
        **kwargs: Any,
    ) -> Any:
        """Draw pictures, as the pipeline's own class does.

        Args:
            args: As for the pipeline's own class.
            strength: Multiplies the whole mixture, as `cross_attention_kwargs={"scale": ...}` does:
                a number, several spread over the steps, or a function of a `Step`.
            masked: Names of experts left out.
            weights: Weights that replace the gates': by expert's name (zero for the others), or
                (E,) or (pictures, E) in the order of `experts`; several mappings or tensors spread
                over the steps, or a function of a `Step`.
            mixing: `Switch` or `Composite`, which replace the UNet's gates.
            guidance: Whether a picture's negative row takes its positive row's gate results
                (shared), or has its own.
            kwargs: As for the pipeline's own class.

        Raises:
            ValueError: An unknown expert, or weights of another number of pictures.
            RuntimeError: Options for a mixture, and no experts are loaded.
            TypeError: A keyword that the pipeline does not know.
        """
        options = Options(
            strength=strength, masked=masked, weights=weights, mixing=mixing, guidance=guidance
        )
        parent: Any = super().__call__  # pyright: ignore[reportAttributeAccessIssue]
        call = signature(parent).bind_partial(*args, **kwargs)
        _check_keywords(call.arguments.get("kwargs", {}))
        if not self.mixtures:
            if any(given for given in (masked, weights is not None, mixing)) or strength != 1.0:
                raise RuntimeError("there is nothing to mix: call load_experts() first")
            return parent(*args, **kwargs)
        copies = call.arguments.get("num_images_per_prompt") or 1
        scale = _taken_scale(call.arguments)
        drawing = Drawing(self, options, _prompts(call.arguments), copies, scale)
        with drawing.running():
            self._drawing = drawing
            try:
                return parent(*call.args, **call.kwargs)
            finally:
                self._drawing = None

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own; the gates of mixed text encoders read no padding."""
        parent: Any = super().encode_prompt  # pyright: ignore[reportAttributeAccessIssue]
        mixtures = self.mixtures
        if not mixtures:
            return parent(*args, **kwargs)
        scale = signature(parent).bind_partial(*args, **kwargs).arguments.get("lora_scale")
        with ExitStack() as stack:
            for mixture in mixtures.values():
                if not mixture.baked:
                    stack.enter_context(mixture.scaled(1.0 if scale is None else scale))
            # Looked up now that the mixtures are held: another thread's drawing is over.
            drawing = self._drawing or Drawing(self, Options())
            stack.enter_context(drawing.encoding())
            return parent(*args, **kwargs)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """A context that records the weights of all that is drawn inside."""
        mixtures = self.mixtures
        with together([]) as stack:
            records = {part: stack.enter_context(m.record()) for part, m in mixtures.items()}
            yield Recording({part: m.names for part, m in mixtures.items()}, records)


def _check_keywords(given: Mapping[str, Any]) -> None:
    strange = [name for name in given if name not in _UNNAMED]
    if strange:
        raise TypeError(f"the pipeline knows no keyword {', '.join(map(repr, strange))}")


def _prompts(call: Mapping[str, Any]) -> int:
    prompt, embeds = call.get("prompt"), call.get("prompt_embeds")
    if isinstance(prompt, list):
        return len(prompt)
    return embeds.shape[0] if prompt is None and embeds is not None else 1


def _taken_scale(call: MutableMapping[str, Any]) -> float:
    """The LoRA scale of `cross_attention_kwargs`, which the mixture takes in its place."""
    told = dict(call.get("cross_attention_kwargs") or {})
    scale = told.pop("scale", None)
    if scale is None:
        return 1.0
    call["cross_attention_kwargs"] = told or None
    return float(scale)
