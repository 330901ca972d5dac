"""LoRAs read and mixed by component: the UNet's part, and the text encoder's."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dreambooth.adapter import blocks
from dreambooth.base import Base
from dreambooth.conditioning import Told, unet_features
from mole_vl import Expert, Mixture, mix, read_components
from mole_vl.faults import some
from mole_vl.gates import GateSpec
from mole_vl.sites import SiteKind

UNET, TEXT = "unet", "text_encoder"


def read_parts(folder: Path) -> dict[str, Expert]:
    """A LoRA's parts by component, the UNet's among them.

    Raises:
        FileNotFoundError: No LoRA there.
        ValueError: It has none for the UNet.
    """
    parts = read_components(folder)
    if UNET not in parts:
        found = ", ".join(filter(None, parts)) or "the LoRA's files themselves"
        raise ValueError(
            f"{folder} has no unet folder (found {found}): expected the LoRA of the UNet "
            f"in {folder / 'unet'}"
        )
    return parts


def check_text(loras: Sequence[Mapping[str, Expert]], base: Base) -> None:
    """Raise ValueError where gates over parts of the text encoder have none, or two encoders."""
    if base.text_encoder_2 is not None:
        raise ValueError(
            f"text_encoder: the base {base.name} has two text encoders (SDXL), expected one: gates "
            "are trained for its UNet alone, with text_encoder: false"
        )
    if not any(TEXT in parts for parts in loras):
        names = some(parts[UNET].name for parts in loras)
        raise ValueError(
            f"text_encoder: none of the LoRAs {names} has a part of the text encoder (a folder "
            "text_encoder beside unet): train them with one, or set text_encoder: false"
        )


def mute_notice(names: Iterable[str]) -> str | None:
    """What to tell of LoRAs whose text encoders' parts are not mixed, or None."""
    listed = list(dict.fromkeys(names))
    if not listed:
        return None
    return (
        f"note: {some(listed)}: parts of the text encoder are not mixed and stay mute; "
        "text_encoder: true gives them gates too (Stable Diffusion 1.x, 2.x). A pipeline is to "
        "leave them out as well: load_experts(..., parts=['unet'])"
    )


def mix_parts(
    base: Base,
    experts: Mapping[str, Sequence[Expert]],
    gate: GateSpec,
    site: SiteKind,
    after: int,
    conditioning: Sequence[Told] = (),
    slots: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> dict[str, Mixture]:
    """Mix a base's networks, each with gates of its own of the same kind.

    Args:
        base: Whose networks are mixed.
        experts: The LoRAs' parts, by component; a LoRA may lack one.
        gate: As for `mole_vl.mix`.
        site: As for `mole_vl.mix`; a text encoder's blocks are its layers.
        after: As for `mole_vl.mix`.
        conditioning: What the UNet's gates read of what it is told.
        slots: Of each component, as for `mole_vl.mix`.
    """
    networks = {UNET: base.unet, TEXT: base.text_encoder}
    told = {UNET: unet_features(base.unet, conditioning, base.noising.steps)}
    return {
        part: mix(
            networks[part],
            found,
            gate=gate,
            site=site,
            after=after,
            blocks=blocks(networks[part]),
            slots=None if slots is None else slots[part],
            features=told.get(part),
        )
        for part, found in experts.items()
    }
