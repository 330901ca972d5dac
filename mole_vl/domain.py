"""What a domain offers to `train_gates.py`: a mixed model, a task for `fit`, a report."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState
from torch import nn

from mole_vl.faults import at_least, refuse
from mole_vl.gates import GateSpec, MoLE, Sigmoid
from mole_vl.mixture import Mixture
from mole_vl.sites import SiteKind
from mole_vl.specs import to_data
from mole_vl.training import LOG, FitConfig, Gauged, Task, centre_gates
from mole_vl.training.choice import check_choice, choice_task
from mole_vl.training.survey import SURVEY


class Domain(ABC):
    """Experts over a base, examples to train gates on, and held-out ones to judge them by."""

    @abstractmethod
    def mix(self, gate: GateSpec, site: SiteKind, after: int) -> Mapping[str, Mixture]:
        """Load and mix; returns the mixtures by the name of their component.

        The arguments are those of `mole_vl.mix`.
        """

    @abstractmethod
    def lesson(self) -> dict[str, object]:
        """What decides, beside gate and loop, what the gates learn: a resumed run must agree on it.

        Plain data; files by their content.
        """

    @abstractmethod
    def task(self, balance: float) -> Task:
        """The task that trains the mixtures' gates; `balance` weighs the balance loss."""

    @abstractmethod
    def report(self, folder: Path) -> str:
        """Judge the arms on held-out examples, leave files in `folder`, return a table.

        Every process calls it; the main one writes.
        """


def prepare(
    domain: Domain,
    gate: GateSpec,
    fit: FitConfig,
    *,
    site: SiteKind = "block",
    after: int = 0,
    balance: float = 0.0,
    centring: int = 4,
    alone: bool = False,
) -> tuple[Mapping[str, Mixture], Task, dict[str, object]]:
    """Mix a domain's models and centre their gates: all that comes before `fit`.

    Args:
        domain: What is mixed.
        gate: What decides the weights.
        fit: The loop that follows; its rows and seed serve the centring.
        site: As for `mole_vl.mix`.
        after: As for `mole_vl.mix`.
        balance: Factor of the balance loss.
        centring: Batches that features are centred over; 0 for none.
        alone: Whether the gate learns from what each expert alone makes of each example
            (`mole_vl.training.choice`) instead of from the mixture's loss. The survey is kept in
            the run's folder.

    Returns:
        The mixtures by component, the task that trains their gates and measures what they say, and
        the settings for `fit` that a resumed run must agree on.

    Raises:
        ValueError: A negative or endless `balance` or `centring`; gates or examples that cannot be
            taught by experts alone, or alone can; what the domain refuses.
    """
    both = "balance is a term of the mixture's loss, which `alone` puts another in the place of"
    refuse(
        "gates",
        [
            at_least("balance", balance, 0),
            at_least("centring", centring, 0),
            both if alone and balance else None,
        ],
    )
    mixtures = domain.mix(gate, site, after)
    shares = isinstance(gate, MoLE) and not isinstance(gate.normaliser, Sigmoid)
    if (shares or alone) and all(len(mixture.names) == 1 for mixture in mixtures.values()):
        raise ValueError(
            "there is one expert, whose share is 1 whatever its score, so that nothing would be "
            "learned: take several experts, or gate.normaliser Sigmoid, which learns how much of "
            "one speaks"
        )
    task = domain.task(balance)
    if alone:
        check_choice(mixtures, task)
        if (fit.output / LOG).exists() and not (fit.output / SURVEY).exists():
            raise ValueError(
                f"fit.output: {fit.output} holds gates that were not taught by experts alone: take "
                "a new folder"
            )
    elif shares and isinstance(gate, MoLE) and gate.top_k == 1:
        raise ValueError(
            "gate.top_k is 1: one expert's share is 1 whatever its score, so that the mixture's "
            "loss teaches nothing; take top_k 2, or alone: true"
        )
    centre_gates(mixtures.values(), task, rows=fit.rows, batches=centring, seed=fit.seed)
    settings = agreed(
        domain, mixtures, gate, site=site, after=after, balance=balance, centring=centring
    )
    if not alone:
        return mixtures, Gauged(task, mixtures), settings
    held = fit.micro_rows or math.ceil(fit.rows / PartialState().num_processes)
    chosen = choice_task(mixtures, task, fit.output, rows=held, settings=domain.lesson())
    return mixtures, chosen, settings | {"alone": True}


def agreed(
    domain: Domain, mixtures: Mapping[str, Mixture], gate: GateSpec, **how: object
) -> dict[str, object]:
    """What a resumed run must agree on: what is learned, by which gates, of which experts."""
    settings: dict[str, object] = {
        "gate": to_data(gate),
        **how,
        **domain.lesson(),
        "experts": {part: [*m.names, *m.digests] for part, m in mixtures.items()},
    }
    told = {part: m.features.name for part, m in mixtures.items() if m.features is not None}
    return settings | ({"features": told} if told else {})


def gate_parameters(mixtures: Mapping[str, Mixture]) -> dict[str, nn.Parameter]:
    """What gate training trains, by component and gate."""
    return {
        f"{component}.{name}": parameter
        for component, mixture in mixtures.items()
        for name, parameter in mixture.gates.named_parameters()
    }
