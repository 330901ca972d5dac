"""Train several LoRAs and mixtures at once, in one process, on one frozen base.

    accelerate launch --num_processes 1 -m nlp.train_many --config configs/text_many.yaml

Every step each of them learns `fit.rows` rows of its own, in one batch of all: each ends with the
weights that it would have had alone (nlp.train_mixture, `fit` and `lr` alike), to rounding: what is
drawn for a row in training, dropout and jitter, is the row's own. Stopped at any moment it goes on
where it was. Leaves each in `output` under its name: a LoRA as a PEFT folder, a mixture as
`nlp.train_mixture` writes it. `mole_vl.tenants.mix_saved_tenants` serves them together.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from mole_vl import Mixture
from mole_vl.faults import as_messages, at_least, instance_of, plain_word, positive, refuse
from mole_vl.files import check_output
from mole_vl.method import Method
from mole_vl.program import command
from mole_vl.specs import to_data
from mole_vl.tenants import (
    check_tenants_place,
    mix_tenants,
    save_tenant,
    tenant_parameters,
    tenant_records,
)
from mole_vl.training import FitConfig, FitResult, Part, Row, Term, fit
from nlp.adapter import blocks
from nlp.data import IGNORED, EncodedRow, Style, TextBatch, digest_rows, to_device
from nlp.dataset import RowSource, rows_of
from nlp.forms import form_of
from nlp.models import BUILT_IN, Bits, load_base
from nlp.task import answer_losses


@dataclass(frozen=True, kw_only=True)
class TenantConfig:
    """One LoRA or mixture among several.

    Args:
        name: Its name, also of its folder.
        method: Its kind: mole_vl.lora.LoRA, mole_vl.mixlora.MixLoRA or mole_vl.mola.MoLA.
        data: The rows that it learns: JSON lines of prompt, answer and task, or a dataset with its
            templates (`nlp.dataset.DatasetRows`).
        lr: Its peak learning rate; that of `fit` if not given.
    """

    name: str
    method: Method
    data: RowSource
    lr: float | None = None

    def __post_init__(self) -> None:
        refuse(
            f"tenant {self.name!r}",
            [
                plain_word("name", self.name),
                instance_of("method", self.method, Method),
                positive("lr", self.lr),
            ],
        )


@dataclass(frozen=True, kw_only=True)
class ManyConfig:
    """Several LoRAs and mixtures over one base.

    Args:
        tenants: What is trained.
        fit: The training loop of each; its rows are those of each in a step.
        output: Where each is written, under its name.
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        style: Prompts as they stand (plain), or in the model's chat template (chat).
        context: The most tokens that a row may have.
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
    """

    tenants: tuple[TenantConfig, ...]
    fit: FitConfig
    output: Path
    base: str = BUILT_IN
    style: Style = "plain"
    context: int = 1024
    quantise: Bits | None = None

    def __post_init__(self) -> None:
        names = [tenant.name for tenant in self.tenants]
        twice = sorted({name for name in names if names.count(name) > 1})
        refuse(
            "ManyConfig",
            [
                None if names else "tenants is empty",
                f"two tenants are called {', '.join(twice)}" if twice else None,
                at_least("context", self.context, 2),
                None
                if self.fit.micro_rows is None
                else "fit.micro_rows is set, and all tenants' rows run as one batch: take fewer "
                "rows, or fewer tenants",
                f"output and fit.output are both {self.output}: a tenant and the run would take "
                "one place"
                if self.output.resolve() == self.fit.output.resolve()
                else None,
                *(
                    f"fit.output is {self.fit.output}, which is the folder of the tenant {name} or "
                    "lies in it: the tenant would take its run's place"
                    for name in names
                    if self.fit.output.resolve().is_relative_to((self.output / name).resolve())
                ),
            ],
        )


class ManyBatch(NamedTuple):
    """The rows of all tenants, and whose each is."""

    text: TextBatch
    owners: Sequence[str]


class ManyTask:
    """Teach each tenant its own rows; the sum of losses that none shares with another.

    Args:
        mixture: The tenants' mixture, whose experts learn.
        methods: What made each, by name.
        rows: What each learns.
        pad: The tokenizer's id of padding.
        rates: What the run's learning rate is multiplied by for some of them.
    """

    def __init__(
        self,
        mixture: Mixture,
        methods: Mapping[str, Method],
        rows: Mapping[str, Sequence[EncodedRow]],
        *,
        pad: int,
        rates: Mapping[str, float],
    ) -> None:
        self._mixture = mixture
        self._model = mixture.model
        self._methods = methods
        self._rows = rows
        self._pad = pad
        self._rates = rates
        self._device = torch.device("cpu")

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What each tenant has to learn."""
        return {name: p for own in self._own().values() for name, p in own.items()}

    def apart(self) -> Sequence[Part]:
        """The tenants' own parameters."""
        return [Part(list(own), self._rates.get(name, 1.0)) for name, own in self._own().items()]

    def _own(self) -> dict[str, dict[str, nn.Parameter]]:
        return {name: tenant_parameters(self._mixture, name) for name in self._methods}

    def place(self, device: torch.device) -> None:
        """Move the model; batches follow it."""
        self._device = device
        self._model.to(device)

    def batch(self, rows: Sequence[Row]) -> ManyBatch:
        """Each tenant's next examples, those that it would learn alone."""
        each = rows[0].rows // len(self._rows)
        names, picked, owners, seeds = list(self._rows), [], [], []
        for row in rows:
            name = names[row.index // each]
            own = replace(row, index=row.index % each, rows=each)
            picked.append(self._rows[name][own.pick(len(self._rows[name]))])
            owners.append(name)
            seeds.append(own.number())
        text = to_device(form_of(self._model).rows(picked, self._pad), self._device)
        text["seeds"] = torch.tensor(seeds, device=self._device)
        return ManyBatch(text, owners)

    def units(self, batch: ManyBatch) -> int:
        """Scored tokens."""
        return int((batch.text["labels"] != IGNORED).sum())

    def losses(self, batch: ManyBatch) -> Mapping[str, Term]:
        """`NAME/lm`, in nats a scored token of the tenant's, and what its method adds."""
        mixture, text = self._mixture, batch.text
        told = mixture.condition(
            real=text["attention_mask"].bool(),
            pool=text["prompt_mask"],
            tenant=batch.owners,
            seeds=text.get("seeds"),
            streams=form_of(self._model).streams(mixture, text),
            hold=True,
        )
        with told, mixture.record() as records:
            losses, scored = answer_losses(self._model, text)
        terms = {}
        for name, method in self._methods.items():
            own = [place for place, owner in enumerate(batch.owners) if owner == name]
            terms[f"{name}/lm"] = Term(losses[own].sum() / scored[own].sum())
            added = method.losses(tenant_records(mixture, name, records), mixture.layout.blocks)
            for term, (value, factor) in added.items():
                terms[f"{name}/{term}"] = Term(value, factor, per_unit=False)
        return terms


@contextmanager
def taught(
    model: PreTrainedModel,
    methods: Mapping[str, Method],
    rows: Mapping[str, Sequence[EncodedRow]],
    run: FitConfig,
    *,
    pad: int,
    lesson: Mapping[str, object],
    rates: Mapping[str, float] | None = None,
) -> Iterator[tuple[Mixture, FitResult]]:
    """Several tenants that have learned their rows, in the model for as long as the block lasts.

    Args:
        model: The base, frozen and in eval mode; it is as it was afterwards.
        methods: What makes each tenant, by name.
        rows: What each learns.
        run: The training loop; its rows are those of each tenant in a step.
        pad: The tokenizer's id of padding.
        lesson: What decides the weights beside the methods and the loop's own settings.
        rates: What the run's learning rate is multiplied by for some of them.

    Raises:
        ValueError: Tenants that cannot be together, or a run of others in the run's folder.
    """
    rates = rates or {}
    mixture = mix_tenants(model, methods, blocks=blocks(model))
    try:
        task = ManyTask(mixture, methods, rows, pad=pad, rates=rates)
        settings = {
            "tenants": {name: to_data(method) for name, method in methods.items()},
            **lesson,
            **({"rates": rates} if rates else {}),
        }
        # Of the model, the new parts alone are in train mode: their dropout is the only one at
        # work.
        mixture.train()
        result = fit(task, replace(run, rows=run.rows * len(methods)), settings)
        mixture.eval()
        yield mixture, result
    finally:
        mixture.unmix()


def main(config: ManyConfig) -> None:
    """Train all, and write each."""
    check_output("output", config.output)
    for one in config.tenants:
        check_tenants_place("output", config.output / one.name)
    check_output("fit.output", config.fit.output)
    if PartialState().num_processes > 1:
        raise ValueError("train_many trains in one process: launch it with --num_processes 1")
    rows = {one.name: rows_of(f"data of {one.name}", one.data) for one in config.tenants}
    model, tokenizer = load_base(config.base, quantise=config.quantise)
    encoded = form_of(model).encode_each(
        rows, tokenizer, style=config.style, context=config.context
    )
    methods = {one.name: one.method for one in config.tenants}
    rates = {one.name: one.lr / config.fit.lr for one in config.tenants if one.lr is not None}
    lesson = {
        "data": {name: digest_rows(own) for name, own in rows.items()},
        "base": config.base,
        "style": config.style,
        "context": config.context,
        **({"quantise": config.quantise} if config.quantise else {}),
    }
    pad = tokenizer.pad_token_id
    with taught(model, methods, encoded, config.fit, pad=pad, lesson=lesson, rates=rates) as (
        mixture,
        result,
    ):
        for name in methods:
            save_tenant(mixture, name, config.output / name, config.base)
    print(f"{result.step} steps, {result.seconds:.0f} s; {', '.join(methods)} in {config.output}")


if __name__ == "__main__":
    with as_messages("nlp"):
        main(command(ManyConfig))
