"""LoRAs and gates that a person brings: uploaded, or named by path or Hub id."""

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from apps.session import Session
from apps.shelf import SUFFIX, Lora, as_folder
from apps.studio import Studio
from mole_vl.faults import refuse
from mole_vl.files import new_folder
from mole_vl.gate_file import read_gates

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
_LORAS = ["*.safetensors", "*.json"]


def take_lora(studio: Studio, session: Session, source: Path, taken: Collection[str]) -> Lora:
    """Read a LoRA, see that it fits the base, and keep it for this session.

    Args:
        studio: Whose base it must fit.
        session: Whose it is.
        source: As for `read_lora`.
        taken: Names that are in use; another one is found if its own is.

    Raises:
        FileNotFoundError: No LoRA is there.
        ValueError: Another type of file, a LoRA that cannot be read, or one for another base.
    """
    name = _free_name(source, taken)
    folder = session.new_path("loras")
    try:
        made = as_folder(source, name, folder, studio.unet_config)
        with studio.holding([made]):
            session.loras[name] = made
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    return made


def uploaded(file: Path, limit: int) -> Path:
    """An uploaded file, if it is a .safetensors of at most `limit` bytes.

    Raises:
        ValueError: Another type, or a larger one.
    """
    size = file.stat().st_size
    refuse(
        "upload",
        [
            None
            if file.suffix.lower() == SUFFIX
            else f"{file.name} is of another type, expected {SUFFIX} (pickles can run code)",
            None
            if size <= limit
            else f"{file.name} has {size / 2**20:.0f} MiB, expected at most {limit / 2**20:.0f}",
        ],
    )
    return file


def find_lora(place: str) -> Path:
    """A LoRA by folder, file, or Hub id (`ORG/REPO`, or `ORG/REPO/FILE.safetensors`).

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: A repository with several LoRAs.
    """
    place = place.strip()
    if not place:
        raise ValueError("the place of the LoRA is empty: expected a Hub id, a folder or a file")
    if (path := _on_disk(place)) is not None:
        return path
    if not _HUB_ID.fullmatch(place) or ".." in place:
        raise FileNotFoundError(
            f"{place[:100]} is neither a folder, a file, nor the form of a Hub id"
        )
    owner, repository, *inner = place.split("/")
    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", allow_patterns=_LORAS))
    except OSError as error:
        raise FileNotFoundError(
            f"{owner}/{repository} is no folder here, and the Hub gave none: {error}"
        ) from error
    return folder.joinpath(*inner) if inner else _only_lora(folder, place)


def take_gates(
    studio: Studio, session: Session, shelf: Mapping[str, Lora], file: Path
) -> tuple[str, ...]:
    """Keep an uploaded gate file of a UNet for the LoRAs that it names; returns their names.

    Args:
        studio: Whose base and LoRAs it must fit.
        session: Whose it is.
        shelf: The LoRAs that are there for everybody.
        file: The gate file.

    Raises:
        ValueError: No gate file, one for LoRAs that are not on the page, or one that does not fit.
    """
    names = read_gates(file).names
    lacking = [name for name in names if name not in session.loras and name not in shelf]
    if lacking:
        raise ValueError(
            f"these gates weigh {', '.join(names)}, and there is no LoRA {', '.join(lacking)} on "
            "this page: bring it first, in a file of that name"
        )
    target = session.new_path("gates")
    try:
        with new_folder(target) as partial:
            (partial / "unet.safetensors").write_bytes(file.read_bytes())
        with studio.holding(session.chosen(list(names), shelf), target):
            session.keep_gates(frozenset(names), target)
    except BaseException:
        shutil.rmtree(target.parent, ignore_errors=True)
        raise
    return names


def _on_disk(place: str) -> Path | None:
    try:
        path = Path(place).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        # A name that is too long, or the home of nobody: neither is there.
        return None


def _only_lora(folder: Path, place: str) -> Path:
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if (folder / "adapter_config.json").exists() or len(files) != 1:
        named = ", ".join(file.name for file in files)
        if len(files) > 1:
            raise ValueError(f"{place} holds several files ({named}): write {place}/FILE")
        return folder
    return files[0]


def _free_name(source: Path, taken: Collection[str]) -> str:
    name = re.sub(r"[^\w.-]+", "-", source.stem).strip("-._")[:40] or "lora"
    free = name
    number = 2
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free
