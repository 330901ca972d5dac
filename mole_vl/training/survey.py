"""What each expert, alone, makes of each example, and what the gate reads of it: asked once, kept.

A survey is one file, with all that decides it in its header.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mole_vl.faults import differences, refuse
from mole_vl.files import new_file
from mole_vl.gates import Gate, Softmax
from mole_vl.gates.mole import LearnedGate
from mole_vl.gates.scores import HiddenScore
from mole_vl.mixture import Mixture
from mole_vl.training.task import Task

SURVEY = "survey.safetensors"


@runtime_checkable
class Answered(Task, Protocol):
    """A task whose examples can be asked one by one."""

    def sizes(self) -> Sequence[int]:
        """What each example takes to ask, all in order: those of like size are asked together."""
        ...

    def examples(self, places: Sequence[int]) -> Any:
        """The batch of these examples."""
        ...

    def likelihoods(self, batch: Any) -> Tensor:
        """Mean log-likelihood of a unit of each example, (rows,), in nats."""
        ...


@dataclass(frozen=True)
class Survey:
    """What a gate reads of each example, and what each expert makes of it.

    Args:
        read: The pooled input of the gate's score, (N, d).
        told: Log-likelihood of each example under each expert alone, (N, E), in nats a unit.
        features: What the model itself is told of each example and the gate is conditioned on,
            (N, F); None for a gate without.
    """

    read: Tensor
    told: Tensor
    features: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name."""
        found = {"read": self.read, "told": self.told, "features": self.features}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def at(self, places: Sequence[int] | Tensor) -> "Survey":
        """Of the examples at these places, or where this mask (N,) is true."""
        return Survey(**{name: tensor[places] for name, tensor in self.tensors().items()})

    def to(self, device: torch.device) -> "Survey":
        """The same on a device."""
        return Survey(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def only_gate(mixture: Mixture) -> tuple[str, LearnedGate]:
    """The one gate of a mixture that experts alone can teach, with its site.

    Raises:
        ValueError: Several gates, or one of another kind.
    """
    names = list(mixture.sites)
    gate = mixture.gate(names[0])
    refuse(
        "alone",
        [
            None
            if len(names) == 1
            else f"{len(names)} gates ({', '.join(names[:3])} ...), expected one for the whole "
            "model: site preview, or network with after 0",
            _gate_fault(gate),
            None
            if mixture.features is None or mixture.features.held
            else f"the features {mixture.features.name!r} change with every forward, and an "
            "example is asked once: leave them out",
            None if mixture.slots is None else "the gates weigh slots, expected experts",
        ],
    )
    assert isinstance(gate, LearnedGate)
    return names[0], gate


def _gate_fault(gate: Gate) -> str | None:
    if (
        not isinstance(gate, LearnedGate)
        or not isinstance(gate.score, HiddenScore)
        or gate.over != "row"
    ):
        return "the gate must be MoLE over rows with Hidden scores"
    if not isinstance(gate.normaliser.spec, Softmax):
        return (
            f"the normaliser is {gate.normaliser.spec}, expected Softmax(): experts alone do not "
            "teach a total"
        )
    return None


@torch.no_grad()
def asked(mixture: Mixture, task: Answered, names: Sequence[str], *, rows: int) -> Survey:
    """Ask all examples of each of some experts, each process its batches.

    Args:
        mixture: With one gate over rows that reads hidden states.
        task: In the mixture's model.
        names: The experts', in the order of the survey's columns.
        rows: Examples of a forward.
    """
    accelerator = Accelerator()
    task.place(accelerator.device)
    _, gate = only_gate(mixture)
    order = torch.tensor(list(task.sizes())).argsort(stable=True)
    batches = order.split(rows)
    own = range(accelerator.process_index, len(batches), accelerator.num_processes)
    parts = []
    for index in own:
        batch = task.examples(batches[index].tolist())
        seen: dict[str, Tensor] = {}
        with accelerator.autocast(), _noting(gate, seen):
            task.likelihoods(batch)
        told = torch.zeros(len(seen["read"]), len(names))
        for place, name in enumerate(names):
            with mixture.pinned({name: 1.0}), accelerator.autocast():
                told[:, place] = task.likelihoods(batch).float().cpu()
        parts.append((index, Survey(told=told, **seen)))
    if accelerator.num_processes > 1:
        parts = gather_object(parts)
    found = [part.tensors() for _, part in sorted(parts, key=lambda part: part[0])]
    whole = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    return Survey(**whole).at(order.argsort())


@contextmanager
def _noting(gate: LearnedGate, seen: dict[str, Tensor]) -> Iterator[None]:
    """Notes what the gate reads in the forward inside: `read`, and `features` if it is told."""

    def note(name: str, place: int, _part: nn.Module, args: Any) -> None:
        seen[name] = args[place].float().cpu()

    hooks = [gate.score.register_forward_pre_hook(partial(note, "read", 0))]
    if gate.conditioning is not None:
        hooks.append(gate.conditioning.register_forward_pre_hook(partial(note, "features", 1)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kept_survey(
    mixture: Mixture, task: Answered, file: Path, made: Mapping[str, object], *, rows: int
) -> Survey:
    """The survey in a file, made first unless it stands there.

    Args:
        mixture: As for `asked`, all of whose experts are asked.
        task: As for `asked`.
        file: Where it is kept.
        made: What decides it, as JSON has it.
        rows: Examples of a forward.

    Raises:
        ValueError: Likelihoods that are no numbers; a survey that is damaged, or was made with
            other settings.
    """
    accelerator = Accelerator()
    if not file.exists():
        found = asked(mixture, task, mixture.names, rows=rows)
        _check_numbers(found, mixture.names)
        if accelerator.is_main_process:
            with new_file(file) as unfinished:
                save_file(found.tensors(), unfinished, metadata={"settings": json.dumps(made)})
        accelerator.wait_for_everyone()
    return _read(file, made)


def _check_numbers(survey: Survey, names: Sequence[str]) -> None:
    odd = (~survey.told.isfinite()).sum(0).tolist()
    refuse(
        "alone",
        [
            *(
                f"{name} gives {count} of {len(survey.told)} examples a likelihood that is no "
                "number: look at its weights, or take bf16 or no mixed precision"
                for name, count in zip(names, odd, strict=True)
                if count
            ),
            *(
                None if bool(read.isfinite().all()) else "the gate reads what are no numbers"
                for read in (survey.read, survey.features)
                if read is not None
            ),
        ],
    )


def _read(file: Path, made: Mapping[str, object]) -> Survey:
    try:
        with safe_open(file, framework="pt") as kept:
            before = json.loads((kept.metadata() or {})["settings"])
            survey = Survey(**{name: kept.get_tensor(name) for name in kept.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged or no survey: {error}; remove it") from error
    if faults := differences(before, made):
        raise ValueError(
            f"{file} was made with other settings ({'; '.join(faults)}); take another output "
            "folder, or remove this one"
        )
    return survey
