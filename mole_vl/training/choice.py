"""A gate taught by what each expert, alone, makes of each example.

The loss of a row x is `1 - sum_e g_e(x) p_e`: g_e is the gate's share of expert e, p_e the
likelihood (0 to 1, of a unit, the geometric mean) that this expert alone gives the row. So a gate
is taught that draws one expert for each row. The likelihood of such a mixture, `-log sum_e g_e p_e`
(Jacobs, Jordan, Nowlan and Hinton, 1991, eq. 1.3), is ruled by rows that no expert knows: there the
least wrong of the strangers gets all. Neither what the gate reads nor what the experts say changes
while it learns: both are found once, and a step costs next to nothing.
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
from mole_vl.gates.mole import LearnedGate, MoLE
from mole_vl.gates.scores import HiddenScore
from mole_vl.mixture import Mixture
from mole_vl.specs import to_data
from mole_vl.training.gauges import measures
from mole_vl.training.rows import Row
from mole_vl.training.task import Task, Term

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


class ChoiceTask:
    """Teach one gate over rows which expert alone tells each example best.

    Args:
        component: The mixture's name among the domain's.
        mixture: The mixture, whose only gate is trained.
        survey: Of all examples.
    """

    def __init__(self, component: str, mixture: Mixture, survey: Survey) -> None:
        self.component = component
        self.mixture = mixture
        self.site, self.gate = _only_gate(mixture)
        self.survey = survey

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The gate's, by the names that training in the mixture has for them."""
        gates = self.mixture.gates.named_parameters()
        return {f"{self.component}.{name}": parameter for name, parameter in gates}

    def place(self, device: torch.device) -> None:
        """Move the gate and the survey; the model is not run."""
        self.gate.to(device)
        self.survey = self.survey.to(device)

    def batch(self, rows: Sequence[Row]) -> Survey:
        """The survey of the epoch's next examples."""
        return self.survey.at([row.pick(len(self.survey.told)) for row in rows])

    def units(self, batch: Survey) -> int:
        """Examples."""
        return len(batch.told)

    def losses(self, batch: Survey) -> Mapping[str, Term]:
        """The term `choice`, between 0 and 1, and the measures of what the gate says.

        The shares are those before the gate's `top_k`, which would leave the others no gradient.
        """
        with torch.autocast(batch.read.device.type, enabled=False):
            weights = self.gate.normaliser(self.gate.logits(batch.read, batch.features, ()))
            shares = weights / weights.sum(-1, keepdim=True)
            loss = 1 - (shares * batch.told.exp()).sum(-1).mean()
        means = {self.site: weights.detach().mean(0)}
        return {"choice": Term(loss), **measures(self.component, means, self.mixture.names)}


def choice_task(
    mixtures: Mapping[str, Mixture],
    task: Task,
    folder: Path,
    *,
    rows: int,
    settings: Mapping[str, object],
) -> ChoiceTask:
    """The choice among a domain's experts, its survey made unless it stands in the folder.

    Args:
        mixtures: One mixture, with one gate over rows that reads hidden states.
        task: Asks its examples one by one (`Answered`).
        folder: Where the survey is kept.
        rows: Examples of a forward.
        settings: What decides the survey beside experts, gate, site and precision, as plain data.

    Raises:
        ValueError: What `check_choice` refuses; likelihoods that are no numbers; a survey that is
            damaged, or was made with other settings.
    """
    component, mixture, task = check_choice(mixtures, task)
    accelerator = Accelerator()
    spec = mixture.spec
    assert isinstance(spec, MoLE)
    reader = {"score": to_data(spec.score), "preview": spec.preview, "site": mixture.layout.kind}
    if mixture.features is not None:
        reader["features"] = mixture.features.name
    told = dict(zip(mixture.names, mixture.digests, strict=True))
    how = {"experts": told, "after": mixture.layout.after, "in": accelerator.mixed_precision}
    made = json.loads(json.dumps({**settings, **reader, **how}, default=str))
    file = folder / SURVEY
    if not file.exists():
        found = asked(mixture, task, mixture.names, rows=rows)
        _check_numbers(found, mixture.names)
        if accelerator.is_main_process:
            with new_file(file) as unfinished:
                save_file(found.tensors(), unfinished, metadata={"settings": json.dumps(made)})
        accelerator.wait_for_everyone()
    return ChoiceTask(component, mixture, _kept(file, made))


def check_choice(mixtures: Mapping[str, Mixture], task: Task) -> tuple[str, Mixture, Answered]:
    """The one mixture that a choice is taught in, with its name, and the task that asks for it.

    Raises:
        ValueError: Several mixtures or gates, gates of another kind, or a task whose examples
            cannot be asked one by one.
    """
    refuse(
        "alone",
        [
            None
            if len(mixtures) == 1
            else f"{', '.join(mixtures)} have gates each, expected one model with one gate",
            None
            if isinstance(task, Answered)
            else f"a {type(task).__name__} cannot ask its examples one by one",
        ],
    )
    assert isinstance(task, Answered)
    ((component, mixture),) = mixtures.items()
    _only_gate(mixture)
    return component, mixture, task


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


def _kept(file: Path, made: Mapping[str, object]) -> Survey:
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


def _only_gate(mixture: Mixture) -> tuple[str, LearnedGate]:
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
    _, gate = _only_gate(mixture)
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
