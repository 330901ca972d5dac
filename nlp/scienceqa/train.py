"""Train MoLA from the settings of its authors' scripts: on instructions, or on whole texts."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from accelerate import PartialState

from mole_vl import Mixture
from mole_vl.files import check_output
from mole_vl.mixture_folder import check_place, save_mixture, take_saved
from mole_vl.mola import MoLA
from mole_vl.specs import to_data
from mole_vl.training import FitConfig, Progress, Watch, fit
from nlp.adapter import blocks
from nlp.calls import TextCalls
from nlp.data import EncodedRow, TextRow, Tokenizer, digest_rows
from nlp.forms import form_of
from nlp.models import load_base
from nlp.scienceqa.config import CAUSAL, InstructionConfig, MoLATraining, TrainConfig, mola_of
from nlp.scienceqa.encoding import cut_prompts, cut_texts, encode
from nlp.scienceqa.held_out import HeldOut
from nlp.scienceqa.reading import instructions, texts
from nlp.scienceqa.template import template_of
from nlp.train_mixture import mixture_task
from nlp.wandb_watch import watch_by

_Cut = Callable[[Sequence[EncodedRow], int, Tokenizer], list[EncodedRow]]


def train(config: TrainConfig) -> None:
    """Train, or go on training, on instructions; write the mixture.

    Raises:
        FileNotFoundError: A base, a dataset, a template or a mixture that is not there.
        ValueError: Settings, rows, or what stands in the folders, that do not go together.
    """
    template = template_of(config.prompt_template_name)
    _check_places(config)
    rows = instructions(config.data_path, template)
    _train(config, rows, _cut_prompts, "the beginning of their prompts")


def train_instruction(config: InstructionConfig) -> None:
    """Train, or go on training, on whole texts; write the mixture.

    Raises:
        FileNotFoundError: As of `train`.
        ValueError: As of `train`.
    """
    _check_places(config)
    rows = texts(config.data_path)
    _train(config, rows, lambda encoded, most, _: cut_texts(encoded, most), "their end")


def _cut_prompts(rows: Sequence[EncodedRow], most: int, tokenizer: Tokenizer) -> list[EncodedRow]:
    return cut_prompts(rows, most, getattr(tokenizer, "bos_token_id", None))


def _check_places(config: MoLATraining) -> None:
    check_place("output_dir", config.output_dir)
    check_output("output_dir", config.run)


def _train(config: MoLATraining, rows: Sequence[TextRow], cut: _Cut, lost: str) -> None:
    """Teach a mixture the rows.

    Args:
        config: The settings.
        rows: What it learns; some are held out.
        cut: Makes rows as short as they may be.
        lost: What they lose by it, in words.
    """
    main = PartialState().is_main_process
    # The first to come may have a base to convert; the others find it done.
    with PartialState().main_process_first():
        model, tokenizer = load_base(
            config.base_model, quantise="8bit" if config.load_in_8bit else None, kind=CAUSAL
        )
    most = min(config.cutoff_len, form_of(model).longest or config.cutoff_len)
    how = partial(encode, inputs=config.train_on_inputs, end=config.add_eos_token)
    whole = [how(row, tokenizer) for row in rows]
    rows_cut = cut(whole, most, tokenizer)
    long = sum(one != other for one, other in zip(whole, rows_cut, strict=True))
    if long and main:
        print(f"{long} of {len(rows)} rows have more than {most} tokens, and lose {lost}")
    learned, held_out = divided(rows_cut, config.held_out(len(rows)), config.seed)
    method = mola_of(config, model, blocks(model))
    mixture = method.mix(model, blocks=blocks(model), calls=TextCalls())
    if config.resume_from_checkpoint:
        take_saved(mixture, config.resume_from_checkpoint)
    task = mixture_task(
        mixture, method, learned, pad=tokenizer.pad_token_id, alike=config.group_by_length
    )
    run = config.loop(len(learned))
    watch = HeldOut(mixture, tokenizer, held_out, run, config.micro_batch_size)
    # Of the model, the new parts alone are in train mode: their dropout is the only one at work.
    mixture.train()
    result = fit(
        task,
        run,
        _lesson(config, method, mixture, learned),
        _watches(config, mixture, run, watch if held_out else None),
    )
    mixture.eval()
    if main:
        save_mixture(mixture, config.output_dir, config.base_model)
        loss = watch.last()
        told = "" if loss is None else f", held-out loss {loss:.4f}"
        print(f"{result.step} steps, {result.seconds:.0f} s{told}; mixture in {config.output_dir}")
    PartialState().wait_for_everyone()


def _lesson(
    config: MoLATraining, method: MoLA, mixture: Mixture, learned: Sequence[EncodedRow]
) -> dict[str, object]:
    """What decides the weights beside the loop's own settings."""
    return {
        "method": to_data(method),
        "base": config.base_model,
        "train": digest_rows(row.row for row in learned),
        "cutoff_len": config.cutoff_len,
        "train_on_inputs": config.train_on_inputs,
        "add_eos_token": config.add_eos_token,
        "group_by_length": config.group_by_length,
        "load_in_8bit": config.load_in_8bit,
        **({"start": list(mixture.digests)} if config.resume_from_checkpoint else {}),
    }


def divided(
    rows: Sequence[EncodedRow], count: int, seed: int
) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """The rows that are learned, in their order, and `count` that are held out."""
    aside = set(random.Random(seed).sample(range(len(rows)), count))
    learned = [row for place, row in enumerate(rows) if place not in aside]
    return learned, [rows[place] for place in sorted(aside)]


def _watches(
    config: MoLATraining, mixture: Mixture, run: FitConfig, held_out: HeldOut | None
) -> Watch:
    def write(folder: Path) -> None:
        save_mixture(mixture, folder, config.base_model)

    watches: list[Watch] = [] if held_out is None else [held_out]
    if config.wandb_project:
        watches.append(
            watch_by(config.wandb_watch, config.wandb_log_model, mixture.model, run, write)
        )

    def watch(progress: Progress) -> None:
        for one in watches:
            one(progress)

    return watch
