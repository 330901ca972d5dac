"""What the gates say while they are trained: their mean weights, logged and drawn."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl.files import new_file
from mole_vl.heat_map import heat_map
from mole_vl.merge import site_means
from mole_vl.mixture import Mixture
from mole_vl.svg import standalone
from mole_vl.training.rows import Row
from mole_vl.training.task import Task, Term

GAUGE = "gates"


class Gauged:
    """A task whose losses are joined by measures: each gate's mean weight of each expert.

    They are called `gates/<component>/<site>/<expert>`, and are means over all forwards of a step.

    Args:
        task: The task.
        mixtures: The mixtures in its model, by component.
    """

    def __init__(self, task: Task, mixtures: Mapping[str, Mixture]) -> None:
        self.task = task
        self.mixtures = mixtures

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The task's."""
        return self.task.parameters()

    def place(self, device: torch.device) -> None:
        """As the task does."""
        self.task.place(device)

    def batch(self, rows: Sequence[Row]) -> Any:
        """The task's."""
        return self.task.batch(rows)

    def units(self, batch: Any) -> int:
        """The task's."""
        return self.task.units(batch)

    def losses(self, batch: Any) -> Mapping[str, Term]:
        """The task's terms, and the measures."""
        with ExitStack() as stack:
            told = {
                component: stack.enter_context(mixture.record())
                for component, mixture in self.mixtures.items()
            }
            terms = self.task.losses(batch)
        for component, records in told.items():
            names = self.mixtures[component].weighed
            terms = {**terms, **measures(component, site_means(records), names)}
        return terms


def measures(component: str, means: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Term]:
    """The measures of a component's mean weights (E,) by site, of experts of these names."""
    return {
        f"{GAUGE}/{component}/{site}/{name}": Term(value, weight=0.0)
        for site, weights in means.items()
        for name, value in zip(names, weights, strict=True)
    }


def draw_gates(log: Path, mixtures: Mapping[str, Mixture], folder: Path) -> None:
    """Draw each component's mean weights over a run, as `<component>.svg`.

    Args:
        log: The `metrics.jsonl` of a run of a gauged task.
        mixtures: The mixtures by component.
        folder: Where the drawings go.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for component, mixture in mixtures.items():
        at = f"{GAUGE}/{component}"
        told = [line for line in lines if any(key.startswith(f"{at}/") for key in line)]
        sites = [
            name
            for name in mixture.sites
            if told and f"{at}/{name}/{mixture.weighed[0]}" in told[0]
        ]
        weights = {
            name: [[line[f"{at}/{site}/{name}"] for line in told] for site in sites]
            for name in mixture.weighed
        }
        if sites:
            axis = f"steps {told[0]['step']} to {told[-1]['step']}"
            label = f"mean weights of {', '.join(weights)} in the {component} by site and step"
            with new_file(folder / f"{component}.svg") as partial:
                partial.write_text(standalone(heat_map(sites, weights, axis=axis, label=label)))
