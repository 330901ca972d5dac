"""A pipeline's mixture beside its base, in the folder `mixture` of the pipeline's own."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mole_vl import Mixture, save_gates
from mole_vl.faults import plain_word, refuse
from mole_vl.files import check_file, check_replaceable, new_folder, read_object
from mole_vl.peft_folder import write_peft
from pipelines.loading import Bank

FOLDER = "mixture"
FORMAT = "mole-vl pipeline 1"
_INDEX = "index.json"
_MODEL_INDEX = "model_index.json"


def save_mixture(folder: Path, bank: Bank, mixtures: Mapping[str, Mixture]) -> None:
    """Write experts, gates and their order into a saved pipeline's folder, in one rename."""
    with new_folder(folder / FOLDER) as partial:
        for name, parts in bank.items():
            for part, expert in parts.items():
                write_peft(expert, partial / "experts" / name / part)
        for part, mixture in mixtures.items():
            save_gates(mixture, partial / "gates" / f"{part}.safetensors")
        index = {"format": FORMAT, "experts": list(bank)}
        (partial / _INDEX).write_text(json.dumps(index, indent=1) + "\n")


def check_place(folder: Path) -> None:
    """Raise ValueError where a saved mixture's place holds anything else, which would be lost."""
    parts = ("experts", "gates", _INDEX)
    check_replaceable("save_directory", folder / FOLDER, parts, "a mixture")


def drop_mixture(folder: Path) -> None:
    """Remove what an older mixture left in a folder."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def has_mixture(folder: Path) -> bool:
    """Whether a mixture was saved with a pipeline, or what is left of one."""
    return (folder / FOLDER).is_dir()


def load_mixture(
    folder: Path,
    load_experts: Callable[[Sequence[str | Path]], None],
    load_gates: Callable[[str | Path], None],
) -> None:
    """Put the experts and gates of a saved pipeline into its base.

    Args:
        folder: The pipeline's.
        load_experts: Mixes experts, by their folders.
        load_gates: Takes gates from a folder of PART.safetensors.

    Raises:
        FileNotFoundError: Its index is missing.
        ValueError: Its index is damaged, or written by another version.
    """
    file = folder / FOLDER / _INDEX
    check_file("from_pretrained", file, "the list of the experts that were saved there")
    index = read_object(file)
    if index.get("format") != FORMAT:
        raise ValueError(f"{file}: format is {index.get('format')!r}, expected {FORMAT!r}")
    names = index.get("experts")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: experts is {names!r}, expected their names")
    refuse(str(file), [plain_word("experts", name) for name in names])
    experts = folder / FOLDER / "experts"
    load_experts([experts / name for name in names])
    load_gates(folder / FOLDER / "gates")


def name_base(folder: Path, kind: type) -> None:
    """Let the folder name diffusers' own pipeline class, so that any tool opens the base."""
    own = next(base.__name__ for base in kind.__mro__ if base.__module__.startswith("diffusers."))
    file = folder / _MODEL_INDEX
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "_class_name": own}, indent=2, sort_keys=True) + "\n")
