"""A gate taught by what each expert, alone, makes of each example.

The loss of a row x is `1 - sum_e g_e(x) p_e`: g_e is the gate's share of expert e, p_e the
likelihood (0 to 1, of a unit, the geometric mean) that this expert alone gives the row. So a gate
is taught that draws one expert for each row. The likelihood of such a mixture, `-log sum_e g_e p_e`
(Jacobs, Jordan, Nowlan and Hinton, 1991, eq. 1.3), is ruled by rows that no expert knows: there the
least wrong of the strangers gets all. Neither what the gate reads nor what the experts say changes
while it learns: both are found once, and a step costs next to nothing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from mole_vl.faults import refuse
from mole_vl.gates.mole import MoLE
from mole_vl.mixture import Mixture
from mole_vl.specs import to_data
from mole_vl.training.gauges import measures
from mole_vl.training.rows import Row
from mole_vl.training.survey import SURVEY, Answered, Survey, kept_survey, only_gate
from mole_vl.training.task import Task, Term


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
        self.site, self.gate = only_gate(mixture)
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
    spec = mixture.spec
    assert isinstance(spec, MoLE)
    reader = {"score": to_data(spec.score), "preview": spec.preview, "site": mixture.layout.kind}
    if mixture.features is not None:
        reader["features"] = mixture.features.name
    told = dict(zip(mixture.names, mixture.digests, strict=True))
    how = {"experts": told, "after": mixture.layout.after, "in": Accelerator().mixed_precision}
    made = json.loads(json.dumps({**settings, **reader, **how}, default=str))
    survey = kept_survey(mixture, task, folder / SURVEY, made, rows=rows)
    return ChoiceTask(component, mixture, survey)


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
    only_gate(mixture)
    return component, mixture, task
