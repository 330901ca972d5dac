"""Train one LoRA a task and write each as a PEFT folder.

    accelerate launch --mixed_precision bf16 -m nlp.train_experts --config configs/text_experts.yaml

Stopped at any moment it goes on where it was; experts whose folder stands are not trained again.
At the end: exact match of the base and of each expert on the held-out rows of its task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mole_vl import Expert, read_peft, trained_expert, write_peft
from mole_vl.experts import faults_of_form
from mole_vl.faults import as_messages, at_least, plain_word, positive, refuse, share
from mole_vl.files import check_output
from mole_vl.program import command
from mole_vl.targets import check_targets
from mole_vl.training import FitConfig, Watch, fit
from nlp.answers import exact_match
from nlp.data import EncodedRow, Style, TextRow, Tokenizer, digest_rows
from nlp.dataset import RowSource, rows_of
from nlp.forms import form_of
from nlp.models import BUILT_IN, Bits, load_base
from nlp.task import LanguageTask


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """The form of one expert: what `train_expert` puts into a base.

    Args:
        name: Its name, also of its folder.
        rank: Rank of each factor pair.
        alpha: The product B A counts alpha / rank times.
        targets: Names of the linear layers that get a pair.
        dropout: Share of a pair's inputs that a training step leaves out.
        dora: Whether it is a DoRA, which learns the norms of the base's rows too.
    """

    name: str
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        refuse(f"{type(self).__name__} {self.name!r}", self.faults())

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [
            plain_word("name", self.name),
            at_least("rank", self.rank, 1),
            positive("alpha", self.alpha),
            None if self.targets else "targets is empty, expected names of linear layers",
            share("dropout", self.dropout),
        ]


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(LoRA):
    """One expert.

    Args:
        name: Its name, also of its folder and of its task in the held-out rows.
        data: The rows it learns: JSON lines of prompt, answer and task, or a dataset with its
            templates (`nlp.dataset.DatasetRows`).
        rank: Rank of each factor pair.
        alpha: The product B A counts alpha / rank times.
        targets: Names of the linear layers that get a pair.
        dropout: Share of a pair's inputs that a training step leaves out.
        dora: Whether it is a DoRA, which learns the norms of the base's rows too.
        steps: Optimiser steps; None for the `fit` settings' own.
        lr: Peak learning rate; None for the `fit` settings' own.
    """

    data: RowSource
    steps: int | None = None
    lr: float | None = None

    def faults(self) -> list[str | None]:
        """What is wrong with it, None for each check that passed."""
        return [
            *super().faults(),
            at_least("steps", self.steps, 1),
            positive("lr", self.lr),
        ]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A family of experts over one base.

    Args:
        experts: The experts.
        held_out: Rows of all tasks for the table at the end, as an expert's `data`.
        fit: The training loop; each expert's run lies in a folder of its name under its `output`.
        output: Where the experts' PEFT folders are written.
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        style: Prompts as they stand (plain), or in the model's chat template (chat).
        context: The most tokens that a row may have.
        batch_rows: Rows generated at once for the table.
        only: Names of the experts to train and score; all of them if empty.
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
    """

    experts: tuple[ExpertConfig, ...]
    held_out: RowSource
    fit: FitConfig
    output: Path
    base: str = BUILT_IN
    style: Style = "plain"
    context: int = 1024
    batch_rows: int = 32
    only: tuple[str, ...] = ()
    quantise: Bits | None = None

    def __post_init__(self) -> None:
        names = [expert.name for expert in self.experts]
        twice = sorted({name for name in names if names.count(name) > 1})
        strange = [name for name in self.only if name not in names]
        refuse(
            "ExpertsConfig",
            [
                None if names else "experts is empty",
                f"two experts are called {', '.join(twice)}" if twice else None,
                f"only names {', '.join(strange)}, expected some of {', '.join(names)}"
                if strange
                else None,
                at_least("context", self.context, 2),
                at_least("batch_rows", self.batch_rows, 1),
                f"output and fit.output are both {self.output}: an expert and its run would take "
                "one place"
                if self.output.resolve() == self.fit.output.resolve()
                else None,
            ],
        )


@dataclass(frozen=True)
class Score:
    """Exact match on one task's held-out rows, in parts of 1."""

    task: str
    rows: int
    base: float
    expert: float


def train_expert(
    model: Any,
    rows: Sequence[EncodedRow],
    lora: LoRA,
    run: FitConfig,
    *,
    pad: int,
    base: str,
    output: Path,
    lesson: Mapping[str, object],
    start: Expert | None = None,
    watch: Callable[[nn.Module, Callable[[Path], None]], Watch | None] | None = None,
) -> None:
    """Train one LoRA on `model`, write its folder, and leave `model` as it was.

    Args:
        model: The base, frozen and in eval mode.
        rows: What the LoRA learns.
        lora: Its form.
        run: The training loop.
        pad: The tokenizer's id of padding.
        base: The base's name, for the folder.
        output: Where the folder `lora.name` is written.
        lesson: What decides the weights beside the loop's own settings.
        start: An expert of the same form, which the training goes on from.
        watch: Makes a watch of the loop, or None, given the model in training, and what writes the
            expert as it is by now into a folder.

    Raises:
        ValueError: `start` is of another form.
    """
    set_seed(run.seed)
    # Of the model, the new parts alone are in train mode: their dropout is the only one at work.
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] (peft divides it, no more)
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            target_modules=list(lora.targets),
            task_type=form_of(model).task_type,
        ),
    )

    if start is not None:
        try:
            _take(adapted.get_base_model(), start)
        except ValueError:
            adapted.unload()
            raise

    def write(folder: Path) -> None:
        expert = trained_expert(adapted.get_base_model(), lora.name, base)
        write_peft(expert, folder, dtype=torch.float16)

    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    task = LanguageTask(adapted, rows, pad=pad, parameters=trained)
    fit(task, run, lesson, watch(adapted, write) if watch else None)
    if PartialState().is_main_process:
        write(output / lora.name)
    PartialState().wait_for_everyone()
    adapted.unload()


@torch.no_grad()
def _take(model: nn.Module, start: Expert) -> None:
    """Put an expert's factors into a model under peft's LoRA."""
    refuse(start.source, faults_of_form(trained_expert(model, start.name), start))
    names = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}
    for path, factors in start.layers.items():
        for key, factor in factors.tensors().items():
            model.get_parameter(f"{path}.{names[key]}.default.weight").copy_(factor)


def _held_out(config: ExpertsConfig) -> Mapping[str, Sequence[TextRow]]:
    """The held-out rows of each expert's task.

    Raises:
        FileNotFoundError: There is no such file or dataset.
        ValueError: An expert whose task has no rows.
    """
    rows = rows_of("held_out", config.held_out)
    found = {e.name: [row for row in rows if row.task == e.name] for e in config.experts}
    refuse(
        f"held_out: {config.held_out}",
        [f"no row of the task {name!r}" for name, mine in found.items() if not mine],
    )
    return found


def score_experts(model: Any, tokenizer: Tokenizer, config: ExpertsConfig) -> list[Score]:
    """Base and written experts, each on its task's held-out rows; `model` is left as it was."""
    held_out = _held_out(config)
    scores = []
    for expert in config.experts:
        mine = held_out[expert.name]
        rows = form_of(model).encode_rows(
            mine, tokenizer, style=config.style, context=config.context, source="held_out"
        )
        with torch.no_grad():
            base = exact_match(model, tokenizer, rows, batch_rows=config.batch_rows)
            adapted = PeftModel.from_pretrained(model, config.output / expert.name)
            hits = exact_match(adapted, tokenizer, rows, batch_rows=config.batch_rows)
            adapted.unload()
        scores.append(Score(expert.name, len(rows), sum(base) / len(rows), sum(hits) / len(rows)))
    return scores


def table(scores: Sequence[Score]) -> str:
    """The scores in Markdown."""
    lines = ["| expert | rows | base | expert |", "|---|---|---|---|"]
    lines += [f"| {s.task} | {s.rows} | {s.base:.2f} | {s.expert:.2f} |" for s in scores]
    return "\n".join(lines)


def main(config: ExpertsConfig) -> None:
    """Train the experts that are not there yet, then score all."""
    if config.only:
        chosen = tuple(expert for expert in config.experts if expert.name in config.only)
        config = replace(config, experts=chosen, only=())
    check_output("output", config.output)
    check_output("fit.output", config.fit.output)
    # All rows are read before the first step: a fault in the last ones shows at once.
    _held_out(config)
    missing = [e for e in config.experts if not (config.output / e.name).exists()]
    for expert in config.experts:
        if expert not in missing:
            read_peft(config.output / expert.name)
    rows = {expert.name: rows_of(f"data of {expert.name}", expert.data) for expert in missing}
    # The first to come may have a base to convert; the others find it done.
    with PartialState().main_process_first():
        model, tokenizer = load_base(config.base, quantise=config.quantise)
    for expert in missing:
        check_targets(model, expert.name, expert.targets)
    encoded = form_of(model).encode_each(
        rows, tokenizer, style=config.style, context=config.context
    )
    shown = {"base": config.base, "style": config.style, "context": config.context}
    quantise = {"quantise": config.quantise} if config.quantise else {}
    for expert in missing:
        run = replace(
            config.fit,
            output=config.fit.output / expert.name,
            steps=expert.steps or config.fit.steps,
            lr=expert.lr or config.fit.lr,
        )
        train_expert(
            model,
            encoded[expert.name],
            expert,
            run,
            pad=tokenizer.pad_token_id,
            base=config.base,
            output=config.output,
            lesson={
                **asdict(expert),
                "data": digest_rows(rows[expert.name]),
                **shown,
                **quantise,
            },
        )
    if PartialState().is_main_process:
        print(table(score_experts(model, tokenizer, config)))


if __name__ == "__main__":
    with as_messages("nlp"):
        main(command(ExpertsConfig))
