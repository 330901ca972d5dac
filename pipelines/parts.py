"""The parts of a Stable Diffusion that can be mixed, and experts read for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from mole_vl import Expert, read_components
from mole_vl.files import new_folder
from mole_vl.peft_folder import write_peft

# Components that may carry experts, each with the tokenizer of its input.
PARTS: Mapping[str, str | None] = {
    "unet": None,
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
}

# A LoRA: a folder of PEFT folders by component, a PEFT folder of a UNet's; or its parts themselves.
Source: TypeAlias = str | Path | Mapping[str, Expert]


def read_experts(sources: Sequence[Source] | Mapping[str, Source]) -> dict[str, dict[str, Expert]]:
    """Parts of each expert by component, by the expert's name.

    Args:
        sources: The LoRAs; named by the mapping's keys, or each by its own name.

    Raises:
        FileNotFoundError: No LoRA there.
        ValueError: No expert at all, two of one name, or an unreadable one.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    named = isinstance(sources, Mapping)
    given = list(sources.items()) if named else [(None, source) for source in sources]
    if not given:
        raise ValueError("load_experts: expected at least one expert, got none")
    found: dict[str, dict[str, Expert]] = {}
    for name, source in given:
        parts = _read_lora(source, name) if isinstance(source, str | Path) else dict(source)
        name = name or next(iter(parts.values())).name
        if name in found:
            raise ValueError(
                f"load_experts: two experts have the name {name}; give names of your own, "
                "{name: path}"
            )
        found[name] = {part: _called(name, expert) for part, expert in parts.items()}
    return found


def fitted(expert: Expert, model: nn.Module) -> Expert:
    """A text encoder's expert under the model's own paths: with or without `text_model.`."""
    known = {path for path, _ in model.named_modules()}
    return expert.renamed({path: _path(path, known) for path in expert.layers})


def real_tokens(ids: Tensor, end: int) -> Tensor:
    """Positions up to the first end token of a row, (rows, positions) bool: the rest is padding.

    Tokenizers of CLIP pad with the end token itself or with another; a row without end is all real.
    """
    return ((ids == end).long().cumsum(-1) - (ids == end).long()) == 0


def write_lora(experts: Mapping[str, Expert], folder: str | Path) -> None:
    """Write one LoRA's parts as PEFT folders by component, in one rename."""
    with new_folder(Path(folder)) as partial:
        for part, expert in experts.items():
            write_peft(expert, partial / part)


def _read_lora(folder: str | Path, name: str | None) -> dict[str, Expert]:
    parts = read_components(folder, name)
    return {part or "unet": expert for part, expert in parts.items()}


def _called(name: str, expert: Expert) -> Expert:
    return Expert(name, expert.layers, expert.base, expert.source)


def _path(path: str, known: set[str]) -> str:
    forms = (path, f"text_model.{path}", path.removeprefix("text_model."))
    return next((form for form in forms if form in known), path)
