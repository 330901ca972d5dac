"""The parts of a Stable Diffusion that can be mixed, and experts read for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dreambooth.lora_files import read_lora
from mole_vl import Expert

# Components that may carry experts, each with the tokenizer of its input.
PARTS: Mapping[str, str | None] = {
    "unet": None,
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
}

# A LoRA: a folder or file of any form that `dreambooth.lora_files` reads; or its parts themselves.
Source: TypeAlias = str | Path | Mapping[str, Expert]


def read_experts(
    sources: Sequence[Source] | Mapping[str, Source], unet_config: Mapping[str, Any]
) -> dict[str, dict[str, Expert]]:
    """Parts of each expert by component, by the expert's name.

    Args:
        sources: The LoRAs; named by the mapping's keys, or each by its own name.
        unet_config: The config of the UNet that they are for.

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
        if isinstance(source, str | Path):
            source = read_lora(source, name, unet_config=unet_config).experts
        parts = dict(source)
        name = name or next(iter(parts.values())).name
        if name in found:
            raise ValueError(
                f"load_experts: two experts have the name {name}; give names of your own, "
                "{name: path}"
            )
        found[name] = {part: _called(name, expert) for part, expert in parts.items()}
    return found


def _called(name: str, expert: Expert) -> Expert:
    return Expert(name, expert.layers, expert.base, expert.source)
