"""Train the adapters of a file of m-LoRA's settings, one after the other over one base.

    DIR/NAME/        an adapter: a mixture's folder (`mole_vl.mixture_folder`), or a LoRA's
    DIR/runs/NAME/   its run: metrics.jsonl, and checkpoints until it ends

Stopped at any moment they go on where they were.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from mole_vl import Mixture, read_peft
from mole_vl.experts import faults_of_form
from mole_vl.faults import refuse
from mole_vl.feedforward import feed_forwards
from mole_vl.files import check_output
from mole_vl.fresh import Form, fresh_expert
from mole_vl.layers import layer_shapes
from mole_vl.mixlora import MixLoRA
from mole_vl.mixlora_folder import read_mixlora
from mole_vl.mixture_folder import save_mixture, take_saved
from mole_vl.nonlinearity import fault_of_nonlinearity
from mole_vl.stack import Learning
from mole_vl.targets import check_targets, target_layers
from mole_vl.training import FitConfig
from mole_vl.training.snapshot import drop_snapshots
from nlp.adapter import blocks
from nlp.calls import TextCalls
from nlp.data import EncodedRow, TextRow, digest_rows
from nlp.mixlora_adapter import RUNS, AdapterSettings
from nlp.mixlora_config import MixLoRASettings
from nlp.mixlora_place import Kind, Place, experts_and_choice, standing, standing_all
from nlp.mixlora_rows import encoded_rows, learned_rows
from nlp.train_experts import train_expert
from nlp.train_mixture import train_mixture


@dataclass(frozen=True)
class _Lesson:
    """What one adapter is to learn."""

    entry: AdapterSettings
    rows: Sequence[TextRow]
    encoded: Sequence[EncodedRow]
    run: FitConfig
    start: Kind | None


def train(
    settings: MixLoRASettings, place: Place, *, go_on: bool = False, overwrite: bool = False
) -> None:
    """Train the adapters that do not stand yet, or go on with all of them.

    Every process calls it; the main one writes and prints.

    Args:
        settings: The adapters.
        place: The base, and where they stand.
        go_on: Whether each goes on from what stands there, which is replaced in the end.
        overwrite: Whether each is made anew, whatever stands there.

    Raises:
        FileNotFoundError: A base, rows, a template, or an adapter to go on with, that is not there.
        ValueError: Settings, rows and base, or what stands, that do not go together.
    """
    check_output("dir", place.folder)
    if go_on:
        standing_all(settings, place)
    kinds: dict[str, Kind | None] = {
        one.name: standing(one, place.folder / one.name, as_said=not overwrite)
        for one in settings.lora
    }
    told = PartialState().is_main_process
    todo = [one for one in settings.lora if go_on or overwrite or kinds[one.name] is None]
    for one in settings.lora:
        if one not in todo and told:
            print(f"{place.folder / one.name}: stands, and is not trained again")
    rows = {one.name: learned_rows(one, place.seed) for one in todo}
    if not todo:
        return
    model, tokenizer = place.load()
    lessons = []
    for one in todo:
        _check_layers(model, one)
        start = kinds[one.name] if go_on else None
        if start is not None:
            _check_start(model, one, place.folder / one.name, start)
        encoded = encoded_rows(model, tokenizer, rows[one.name], one, settings.cutoff_len)
        output, save_step = place.folder / RUNS / one.name, settings.save_step
        run = one.fit(output, len(encoded), save_step=save_step, seed=place.seed)
        lessons.append(_Lesson(one, rows[one.name], encoded, run, start))
    for lesson in lessons:
        decides = {
            "base": place.base,
            "tokenizer": place.tokenizer,
            "quantise": place.quantise,
            "dtype": str(place.dtype),
            "train": digest_rows(lesson.rows),
            "cutoff_len": settings.cutoff_len,
            "train_on_inputs": lesson.entry.train_on_inputs,
        }
        teach = _teach_lora if lesson.entry.strategy is None else _teach_mixture
        teach(model, lesson, place, tokenizer.pad_token_id, decides)
        if told:
            # What they led to is kept now, and a run that goes on from it is another one.
            drop_snapshots(lesson.run.output)
            print(f"{place.folder / lesson.entry.name}: {lesson.run.steps} steps")
        PartialState().wait_for_everyone()


def _teach_lora(
    model: PreTrainedModel, lesson: _Lesson, place: Place, pad: int, decides: Mapping[str, object]
) -> None:
    entry, folder = lesson.entry, place.folder / lesson.entry.name
    start = read_peft(folder, entry.name) if lesson.start else None
    lora = entry.lora
    train_expert(
        model,
        lesson.encoded,
        lora,
        lesson.run,
        pad=pad,
        base=place.base,
        output=place.folder,
        lesson={**asdict(lora), **decides, "start": start.digest if start else None},
        start=start,
    )


def _teach_mixture(
    model: PreTrainedModel, lesson: _Lesson, place: Place, pad: int, decides: Mapping[str, object]
) -> None:
    folder, method = place.folder / lesson.entry.name, lesson.entry.method
    mixture, method = _begun(model, method, folder, lesson.start)
    try:
        start = list(mixture.digests) if lesson.start else None
        train_mixture(
            mixture, method, lesson.encoded, lesson.run, pad=pad, lesson={**decides, "start": start}
        )
        if PartialState().is_main_process:
            save_mixture(mixture, folder, place.base)
    finally:
        mixture.unmix()


def _begun(
    model: PreTrainedModel, method: MixLoRA, folder: Path, start: Kind | None
) -> tuple[Mixture, MixLoRA]:
    """A mixture that learns, new or as it stands in a folder, and its method."""
    own: dict[str, Any] = {"blocks": blocks(model), "calls": TextCalls()}
    if start is None:
        return method.mix(model, **own), method
    # It may be one that the settings do not tell whole.
    method = replace(method, choice=experts_and_choice(folder, start)[1])
    if start == "mixture":
        mixture = method.mix(model, **own)
        try:
            take_saved(mixture, folder)
        except BaseException:
            mixture.unmix()
            raise
        return mixture, method
    found = read_mixlora(folder, model, blocks=own["blocks"])
    there = found.method
    refuse(
        str(folder),
        [
            f"its {name} are {old}, and the settings say {new}: give its own"
            for name, old, new in (
                ("experts", there.form, method.form),
                ("other factors", there.shared, method.shared),
                ("layers", sorted(there.targets or ()), sorted(method.targets or ())),
            )
            if old != new
        ],
    )
    return found.mix(model, learning=Learning(dropout=method.dropout), **own), method


def _check_layers(model: PreTrainedModel, entry: AdapterSettings) -> None:
    """Raise ValueError unless the base has an adapter's layers, and its nonlinearity."""
    check_targets(model, entry.name, entry.targets)
    if entry.strategy is None:
        return
    owners = feed_forwards(model, target_layers(model, entry.targets), blocks(model))
    if not owners:
        raise ValueError(
            f"target_modules of {entry.name}: none lies in a feed-forward that is a module of its "
            "own, so that there is nothing to route: name some, or leave routing_strategy out"
        )
    if entry.act_fn is None:
        return
    faults = {fault_of_nonlinearity(model, own, entry.act_fn) for own in {*owners.values()}}
    told = sorted(fault for fault in faults if fault)[:1]
    refuse(f"act_fn of {entry.name}", [f"{one}; leave act_fn out" for one in told])


def _check_start(model: PreTrainedModel, entry: AdapterSettings, folder: Path, start: Kind) -> None:
    """Raise ValueError unless an adapter can go on from what stands."""
    if start != "lora":
        mixture, _ = _begun(model, entry.method, folder, start)
        mixture.unmix()
        return
    shapes, form = (
        layer_shapes(model),
        Form(rank=entry.lora.rank, alpha=entry.lora.alpha, dora=entry.lora.dora),
    )
    paths = [path for path in target_layers(model, entry.targets) if path in shapes]
    new = fresh_expert(entry.name, model, dict.fromkeys(paths, form))
    refuse(str(folder), faults_of_form(new, read_peft(folder, entry.name)))
