"""A trained mixture on disk: a PEFT folder for each expert, and its gates.

    FOLDER/experts/NAME/       adapter_config.json, adapter_model.safetensors
    FOLDER/gates/model.safetensors

Each expert is an ordinary LoRA, which any tool reads by itself.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mole_vl.calls import Calls
from mole_vl.experts import Expert, faults_of_form
from mole_vl.faults import differences, plain_word, refuse, some
from mole_vl.files import check_file, check_replaceable, new_folder
from mole_vl.gate_file import (
    GateFile,
    check_unchanged,
    load_gates,
    mix_from,
    read_gates,
    save_gates,
)
from mole_vl.mixture import Mixture
from mole_vl.peft_folder import read_peft, write_peft
from mole_vl.specs import to_data

EXPERTS, GATES = "experts", Path("gates/model.safetensors")
PARTS = (EXPERTS, GATES.parts[0])
"""What lies in a mixture's folder."""


def check_place(name: str, folder: Path) -> None:
    """Raise ValueError unless a mixture can be written there and nothing else would be lost.

    Args:
        name: The setting, for messages.
        folder: The folder, which need not be there.
    """
    check_replaceable(name, folder, PARTS, "a mixture")


def save_mixture(mixture: Mixture, folder: str | Path, base: str | None = None) -> None:
    """Write a mixture's experts and gates, in one rename; an older folder there is replaced.

    Args:
        mixture: The mixture.
        folder: Where to.
        base: The base's name, which the experts' folders tell.
    """
    with new_folder(Path(folder)) as partial:
        for expert in mixture.experts():
            write_peft(replace(expert, base=base), partial / EXPERTS / expert.name)
        save_gates(mixture, partial / GATES)


def mix_saved(
    model: nn.Module,
    folder: str | Path,
    *,
    blocks: Mapping[str, int],
    calls: Calls | None = None,
) -> Mixture:
    """Mix a model as a folder says, its experts frozen.

    Args:
        model: The base.
        folder: What `save_mixture` wrote.
        blocks: As for `mole_vl.mix`.
        calls: As for `mole_vl.mix`.

    Raises:
        FileNotFoundError: The folder holds no mixture, or lacks an expert.
        ValueError: It is damaged, or was made for another base.
    """
    found, experts = read_mixture(Path(folder))
    return mix_from(model, experts, found.source, blocks=blocks, calls=calls)


@torch.no_grad()
def take_saved(mixture: Mixture, folder: str | Path) -> None:
    """Put what a folder holds into a mixture whose experts learn: the training goes on from there.

    Raises:
        FileNotFoundError: The folder holds no mixture, or lacks an expert.
        ValueError: It holds other experts, experts of other forms, or gates that choose among them
            otherwise; nothing is changed then.
    """
    found, experts = read_mixture(Path(folder))
    if found.names != mixture.names:
        raise ValueError(
            f"{folder} holds {len(found.names)} experts ({some(found.names)}), and this mixture "
            f"has {len(mixture.names)} ({some(mixture.names)}): a saved mixture keeps its experts; "
            "take the settings that it was made with, or begin anew without it"
        )
    faults = [
        fault
        for own, saved in zip(mixture.experts(), experts, strict=True)
        for fault in faults_of_form(own, saved)
    ]
    faults += differences(_choices(to_data(found.spec)), _choices(to_data(mixture.spec)))
    refuse(str(folder), faults[:3])
    load_gates(mixture, found)
    for place, expert in enumerate(experts):
        for path, factors in expert.layers.items():
            own = mixture.layers[path].part(place)
            assert own is not None
            for mine, saved in zip(own.tensors().values(), factors.tensors().values(), strict=True):
                mine.copy_(saved)


def _choices(spec: Any, name: str = "") -> dict[str, object]:
    """How the parts of a gate's specification choose, by name; trained gates need no more of it."""
    found: dict[str, object] = {}
    if isinstance(spec, Mapping):
        for key, value in spec.items():
            if key == "choice":
                found[f"{name}choice"] = value
            else:
                found |= _choices(value, f"{name}{key}.")
    return found


def read_mixture(folder: Path) -> tuple[GateFile, list[Expert]]:
    """The gates and the experts, in the gates' order, of what `save_mixture` wrote.

    Raises:
        FileNotFoundError: The folder holds no mixture, or lacks an expert.
        ValueError: It is damaged, or an expert is not the one that its gates were trained with.
    """
    check_file("mixture", folder / GATES, "the gates of a mixture that was trained and saved")
    found = read_gates(folder / GATES)
    faults = [plain_word("an expert's name", name) for name in found.names]
    refuse(str(folder / GATES), faults)
    experts = [read_peft(folder / EXPERTS / name) for name in found.names]
    check_unchanged(found, experts)
    return found, experts
