"""PHATGOOSE for task LoRAs: a short training of each expert's gate on its own rows, then one file.

    accelerate launch -m nlp.train_phatgoose --config configs/text_phatgoose.yaml

Stopped at any moment it goes on where it was; experts whose gate stands are not trained again.
Leaves each expert's own gate as `alone/NAME.safetensors`, and all of them as
`gates/model.safetensors`, in the folder `fit.output`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from mole_vl import Expert, Mixture, mix, mix_from, read_peft, save_gates
from mole_vl.domain import gate_parameters
from mole_vl.experts import check_names
from mole_vl.faults import as_messages, at_least, refuse
from mole_vl.files import check_output
from mole_vl.gates import Phatgoose, Usefulness, UsefulnessGate, take_directions
from mole_vl.program import command
from mole_vl.training import FitConfig, fit
from nlp.adapter import bound
from nlp.data import Style, TextRow, digest_rows
from nlp.dataset import RowSource, rows_of
from nlp.forms import form_of
from nlp.models import BUILT_IN, Bits, load_base
from nlp.task import LanguageTask


@dataclass(frozen=True, kw_only=True)
class Taught:
    """An expert, and what its gate learns from.

    Args:
        folder: Its PEFT folder, whose name is the expert's.
        data: Rows of its own task, such as those that it was trained on: JSON lines of prompt,
            answer and task, or a dataset with its templates (`nlp.dataset.DatasetRows`).
    """

    folder: Path
    data: RowSource


@dataclass(frozen=True, kw_only=True)
class AloneConfig:
    """How the gate of one expert alone is trained.

    Args:
        fit: The training of one expert's gate; the paper's has some 100 steps.
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        style: Prompts as they stand (plain), or in the model's chat template (chat).
        context: The most tokens that a row may have.
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
    """

    fit: FitConfig
    base: str = BUILT_IN
    style: Style = "plain"
    context: int = 1024
    quantise: Bits | None = None

    def __post_init__(self) -> None:
        refuse(type(self).__name__, self.faults())

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [at_least("context", self.context, 2)]


@dataclass(frozen=True, kw_only=True)
class PhatgooseConfig(AloneConfig):
    """A family of experts over one base.

    Args:
        experts: The experts with their rows.
        gate: How the experts are routed among afterwards.
    """

    experts: tuple[Taught, ...]
    gate: Phatgoose = Phatgoose()

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [None if self.experts else "experts is empty", *super().faults()]


def train_alone(
    model: Any, tokenizer: Any, expert: Expert, data: Sequence[TextRow], config: AloneConfig
) -> None:
    """Train the gate of one expert alone, and leave it as a file; `model` is as it was then."""
    rows = form_of(model).encode_rows(
        data,
        tokenizer,
        style=config.style,
        context=config.context,
        source=f"data of {expert.name}",
    )
    mixture = mix(model, [expert], gate=Usefulness(), site="matrix")
    task = LanguageTask(
        model,
        rows,
        pad=tokenizer.pad_token_id,
        parameters=gate_parameters({"model": mixture}),
        around=bound(mixture),
    )
    settings = {
        "base": config.base,
        **({"quantise": config.quantise} if config.quantise else {}),
        "expert": [expert.name, expert.digest],
        "data": digest_rows(data),
        "style": config.style,
        "context": config.context,
    }
    fit(task, replace(config.fit, output=config.fit.output / "runs" / expert.name), settings)
    if PartialState().is_main_process:
        save_gates(mixture, _file(config, expert.name))
    PartialState().wait_for_everyone()
    mixture.unmix()


def train_missing(
    model: Any,
    tokenizer: Any,
    experts: Sequence[Expert],
    data: Sequence[Sequence[TextRow]],
    config: AloneConfig,
) -> None:
    """Train the gates that are not there yet, each on its own expert's rows."""
    for expert, rows in zip(experts, data, strict=True):
        if not _file(config, expert.name).exists():
            train_alone(model, tokenizer, expert, rows, config)


def learned_directions(model: Any, expert: Expert, config: AloneConfig) -> dict[str, Tensor]:
    """What an expert's gate learned alone, by site; `model` is as it was then.

    Raises:
        FileNotFoundError: A gate that was not trained yet.
        ValueError: A gate that was learned for other factors.
    """
    alone = mix_from(model, [expert], _file(config, expert.name))
    found = {
        site: gate.direction.detach().cpu().clone()
        for site in alone.sites
        if isinstance(gate := alone.gate(site), UsefulnessGate)
    }
    alone.unmix()
    return found


def joined(model: Any, experts: Sequence[Expert], config: PhatgooseConfig) -> Mixture:
    """The model mixed with experts, all or some, routed by what each gate learned alone.

    Raises:
        FileNotFoundError: A gate that was not trained yet.
        ValueError: A gate that was learned for other factors.
    """
    learned = {expert.name: learned_directions(model, expert, config) for expert in experts}
    mixture = mix(model, experts, gate=config.gate, site="matrix")
    take_directions({site: mixture.gate(site) for site in mixture.sites}, mixture.names, learned)
    return mixture


def _file(config: AloneConfig, name: str) -> Path:
    return config.fit.output / "alone" / f"{name}.safetensors"


def main(config: PhatgooseConfig) -> None:
    """Train the gates that are not there yet, then join all."""
    check_output("fit.output", config.fit.output)
    experts = [read_peft(taught.folder) for taught in config.experts]
    check_names(experts)
    # All rows are read before the first step: a fault in the last ones shows at once.
    data = [
        rows_of(f"data of {expert.name}", taught.data)
        for expert, taught in zip(experts, config.experts, strict=True)
    ]
    with PartialState().main_process_first():
        model, tokenizer = load_base(config.base, quantise=config.quantise)
    train_missing(model, tokenizer, experts, data, config)
    mixture = joined(model, experts, config)
    if PartialState().is_main_process:
        file = config.fit.output / "gates/model.safetensors"
        save_gates(mixture, file)
        print(f"gates of {', '.join(mixture.names)} in {file}")


if __name__ == "__main__":
    with as_messages("nlp"):
        main(command(PhatgooseConfig))
