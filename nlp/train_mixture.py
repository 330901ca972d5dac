"""Train a mixture whose experts are made with it: MixLoRA, MoLA, or one LoRA beside them.

    accelerate launch --mixed_precision bf16 -m nlp.train_mixture --config configs/text_mixlora.yaml

Experts and routers learn together over a frozen base. Stopped at any moment it goes on where it
was. Leaves experts, each a PEFT folder, and gates in `output`, and a table of exact match on the
held-out rows; with `start` it goes on from such a folder. `mole_vl.mixture_folder.mix_saved` reads
it into a model, also into that of a `pipelines.MoLETextGeneration`.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from torch import Tensor

from mole_vl import Mixture
from mole_vl.domain import gate_parameters
from mole_vl.faults import as_messages, at_least, instance_of, refuse
from mole_vl.files import check_file, check_output, new_file
from mole_vl.losses import load_entropy, routed
from mole_vl.method import Method
from mole_vl.mixture_folder import GATES, check_place, save_mixture, take_saved
from mole_vl.passes import Record
from mole_vl.program import command
from mole_vl.specs import to_data
from mole_vl.training import FitConfig, FitResult, fit
from nlp.adapter import blocks, bound
from nlp.answers import exact_match
from nlp.calls import TextCalls
from nlp.data import EncodedRow, Style, TextRow, Tokenizer, digest_rows
from nlp.dataset import RowSource, rows_of
from nlp.forms import form_of
from nlp.mixed_text import first_of_each, table
from nlp.models import BUILT_IN, Bits, load_base
from nlp.task import LanguageTask


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A mixture to be trained.

    Args:
        method: Its kind: mole_vl.mixlora.MixLoRA, mole_vl.mola.MoLA or mole_vl.lora.LoRA.
        train: Where the rows that it learns come from: files of JSON lines with prompt, answer and
            task, or datasets with their templates (`nlp.dataset.DatasetRows`).
        held_out: Rows for the table at the end, as one of `train`.
        fit: The training loop.
        output: Where the mixture is written.
        start: A mixture that was written before, of the same method: the training goes on from it.
        base: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        style: Prompts as they stand (plain), or in the model's chat template (chat).
        context: The most tokens that a row may have.
        batch_rows: Rows generated at once for the table.
        asked: Held-out rows of each task that the table asks; all of them if not given.
        quantise: Linear layers of the base in 8bit or 4bit (needs bitsandbytes).
    """

    method: Method
    train: tuple[RowSource, ...]
    held_out: RowSource
    fit: FitConfig
    output: Path
    start: Path | None = None
    base: str = BUILT_IN
    style: Style = "plain"
    context: int = 1024
    batch_rows: int = 32
    asked: int | None = None
    quantise: Bits | None = None

    def __post_init__(self) -> None:
        refuse(
            "MixtureConfig",
            [
                instance_of("method", self.method, Method),
                None if self.train else "train is empty, expected where rows come from",
                at_least("context", self.context, 2),
                at_least("batch_rows", self.batch_rows, 1),
                at_least("asked", self.asked, 1),
                f"fit.output is {self.fit.output}, which is output or lies in it: the mixture "
                "would take its run's place"
                if self.fit.output.resolve().is_relative_to(self.output.resolve())
                else None,
            ],
        )


def mixture_task(
    mixture: Mixture, method: Method, rows: Sequence[EncodedRow], *, pad: int, alike: bool = False
) -> LanguageTask:
    """The task of teaching a mixture's experts and gates some rows; the routers' load is measured.

    Args:
        mixture: The mixture, whose experts learn.
        method: What made it.
        rows: What it learns.
        pad: The tokenizer's id of padding.
        alike: Whether rows of like length come in one batch.
    """

    def added(records: Sequence[Record]) -> dict[str, tuple[Tensor, float]]:
        own = method.losses(records, mixture.layout.blocks)
        measured = {"load entropy": (load_entropy(records), 0.0)} if routed(records) else {}
        return {**own, **measured}

    return LanguageTask(
        mixture.model,
        rows,
        pad=pad,
        parameters={**gate_parameters({"model": mixture}), **mixture.parameters_of_experts()},
        around=bound(mixture, added),
        alike=alike,
    )


def train_mixture(
    mixture: Mixture,
    method: Method,
    rows: Sequence[EncodedRow],
    run: FitConfig,
    *,
    pad: int,
    lesson: Mapping[str, object],
) -> FitResult:
    """Teach a mixture's experts and gates some rows, from the start or where the run stands.

    Args:
        mixture: The mixture, whose experts learn; it is in eval mode afterwards.
        method: What made it.
        rows: What it learns.
        run: The training loop.
        pad: The tokenizer's id of padding.
        lesson: What decides the weights beside the method and the loop's own settings.
    """
    task = mixture_task(mixture, method, rows, pad=pad)
    # Of the model, the new parts alone are in train mode: their dropout is the only one at work.
    mixture.train()
    result = fit(task, run, {"method": to_data(method), **lesson})
    mixture.eval()
    return result


def hits_by_arm(
    mixture: Mixture, tokenizer: Tokenizer, rows: Sequence[EncodedRow], batch_rows: int
) -> dict[str, list[bool]]:
    """Exact match of each row, of the base alone and of the mixture."""
    arms = {"base": mixture.disabled, "mixture": nullcontext}
    found = {}
    for name, arm in arms.items():
        with arm():
            found[name] = exact_match(
                mixture.model, tokenizer, rows, batch_rows=batch_rows, around=bound(mixture)
            )
    return found


def main(config: MixtureConfig) -> None:
    """Train the mixture, or go on with it; write it; judge it."""
    check_place("output", config.output)
    check_output("fit.output", config.fit.output)
    if config.start is not None:
        check_file("start", config.start / GATES, "the gates of a mixture that was trained")
    train = [row for one in config.train for row in rows_of("train", one)]
    held_out = first_of_each(rows_of("held_out", config.held_out), config.asked)
    # The first to come may have a base to convert; the others find it done.
    with PartialState().main_process_first():
        model, tokenizer = load_base(config.base, quantise=config.quantise)

    def encoded(source: str, rows: Sequence[TextRow]) -> Sequence[EncodedRow]:
        form = form_of(model)
        return form.encode_rows(
            rows, tokenizer, style=config.style, context=config.context, source=source
        )

    learned, asked = encoded("train", train), encoded("held_out", held_out)
    mixture = config.method.mix(model, blocks=blocks(model), calls=TextCalls())
    if config.start is not None:
        take_saved(mixture, config.start)
    lesson = {
        "base": config.base,
        "train": digest_rows(train),
        "style": config.style,
        "context": config.context,
        **({"quantise": config.quantise} if config.quantise else {}),
        **({"start": list(mixture.digests)} if config.start else {}),
    }
    pad = tokenizer.pad_token_id
    result = train_mixture(mixture, config.method, learned, config.fit, pad=pad, lesson=lesson)
    if PartialState().is_main_process:
        save_mixture(mixture, config.output, config.base)
        print(f"{result.step} steps, {result.seconds:.0f} s; mixture in {config.output}")
        found = table(
            [row.task for row in held_out],
            hits_by_arm(mixture, tokenizer, asked, config.batch_rows),
        )
        with new_file(config.fit.output / "report.md") as partial:
            partial.write_text(found + "\n")
        print(found)
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    with as_messages("nlp"):
        main(command(MixtureConfig))
