"""The LoRAs that a page offers, each as a PEFT folder that drawing and training both read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.words import Words, world_words
from dreambooth.lora_files import LoraFile, read_lora, write_lora

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Lora:
    """A LoRA on the page.

    Args:
        name: What the page calls it.
        folder: Its parts by component, in PEFT's format.
        words: What calls it.
    """

    name: str
    folder: Path
    words: Words


def as_folder(source: Path, name: str, output: Path, unet_config: Mapping[str, Any]) -> Lora:
    """Read a LoRA of any form and keep it as a PEFT folder.

    Args:
        source: As for `read_lora`.
        name: What the page calls it.
        output: Where its folder is written, under its name.
        unet_config: Of the base's UNet.

    Raises:
        FileNotFoundError: No LoRA is there.
        ValueError: A LoRA that cannot be read.
    """
    found = read_lora(source, name, unet_config=unet_config)
    write_lora(found.experts, output / name, "peft")
    return Lora(name, output / name, _triggers(found))


class Shelf(Mapping[str, Lora]):
    """The LoRAs of a folder, by name; what is no PEFT folder yet is made one when it is asked for.

    Args:
        folder: LoRA folders and .safetensors files; a world's folder around it gives their words.
        scratch: Where PEFT folders are written.
        unet_config: Of the base's UNet.

    Raises:
        FileNotFoundError: No such folder.
    """

    def __init__(self, folder: Path, scratch: Path, unet_config: Mapping[str, Any]) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"loras: {folder} is no folder, expected one of LoRAs")
        found = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
        sources = {path.stem: path for path in found if path.is_dir() or path.suffix == SUFFIX}
        self._words = world_words(folder.parent)
        # A world's own order has its subjects before its styles.
        ordered = [name for name in self._words if name in sources]
        self._sources = {name: sources[name] for name in dict.fromkeys([*ordered, *sources])}
        self._scratch = scratch
        self._unet_config = unet_config
        self._made: dict[str, Lora] = {}

    def __getitem__(self, name: str) -> Lora:
        source = self._sources[name]
        if name not in self._made:
            if name in self._words:
                self._made[name] = Lora(name, source, self._words[name])
            else:
                self._made[name] = as_folder(source, name, self._scratch, self._unet_config)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def first_choice(self) -> list[str]:
        """What the page opens with: a world's first subject and first style, or two LoRAs."""
        subjects = [name for name, words in self._words.items() if not words.style and name in self]
        styles = [name for name, words in self._words.items() if words.style and name in self]
        return [*subjects[:1], *styles[:1]] or list(self)[:2]


def _triggers(found: LoraFile) -> Words:
    said = ", ".join(found.triggers)
    return Words(prompt=said, caption=said)
