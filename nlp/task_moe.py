"""Task experts over one base, and the classifiers that choose among them: their training.

The system of github.com/adithya-s-k/MoLE: an expert for each task, and a classifier of what is
asked, whose probabilities are the experts' weights.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from mole_vl import read_peft
from mole_vl.files import check_output, digest_contents, new_file, read_object
from mole_vl.layers import layer_shapes
from mole_vl.targets import check_targets
from mole_vl.training import FitConfig, Watch
from nlp.bert_classifier import BertClassifier, train_bert
from nlp.classifier import Classifier, Judged, Kind, Labelled, judge, read_header
from nlp.data import Tokenizer, digest_rows
from nlp.embedding_classifier import EmbeddingClassifier, train_embedding
from nlp.encoders import Embedder, encoder_source
from nlp.forms import form_of
from nlp.models import load_base
from nlp.task_config import OPTIMIZERS, TaskMoEConfig
from nlp.templates import Asked, read_asked
from nlp.train_experts import LoRA, train_expert
from nlp.wandb_watch import watch_by

SCORES = "classifiers.json"


@dataclass(frozen=True)
class Rows:
    """A task's rows: those that are learned from, and those kept aside."""

    learned: Sequence[Asked]
    held_out: Sequence[Asked]


def train(config: TaskMoEConfig) -> dict[Kind, Judged]:
    """Train the experts and classifiers that are not there yet, then judge the classifiers.

    Every process calls it; the main one writes and prints.

    Raises:
        FileNotFoundError: A model, or a data set, that is not there.
        ValueError: Settings, rows, or what stands in the folders, that do not go together.
    """
    check_output("output", config.output)
    check_output("experts", config.shelf)
    loop(config, "check", steps=1)  # A package that is missing shows before any work.
    rows = read_rows(config)
    learned = [one for task in rows.values() for one in labelled(task.learned)]
    held_out = [one for task in rows.values() for one in labelled(task.held_out)]
    standing = [kind for kind in config.kinds if _stands(config, kind, learned)]
    # No process may write what another one is still to look for.
    PartialState().wait_for_everyone()
    _train_experts(config, rows)
    for kind in config.kinds:
        if kind not in standing:
            _train_classifier(config, kind, learned)
    scores: dict[Kind, Judged] = {
        kind: judge(load_classifier(config.output / kind, kind), held_out) for kind in config.kinds
    }
    if PartialState().is_main_process:
        with new_file(config.output / SCORES) as partial:
            partial.write_text(json.dumps({k: asdict(s) for k, s in scores.items()}, indent=2))
        print(table(scores))
        print(f"answers are given by the {chosen(config)} classifier")
    PartialState().wait_for_everyone()
    return scores


def read_rows(config: TaskMoEConfig) -> dict[str, Rows]:
    """The rows of each task; a question that comes twice is kept aside twice or never.

    Raises:
        FileNotFoundError: A data set that is not there.
        ValueError: A data set that cannot be read, rows that lack what their template names, or a
            task with one question.
    """
    found = {}
    for name, task in config.tasks.items():
        asked = read_asked(f"tasks.{name}.dataset_name", task.rows(name))
        questions = sorted({one.question for one in asked})
        if len(questions) < 2:
            raise ValueError(
                f"tasks.{name}: one question, expected two or more: some are kept aside"
            )
        count = min(max(1, round(config.held_out * len(questions))), len(questions) - 1)
        order = np.random.default_rng([config.seed, len(questions)]).permutation(len(questions))
        aside = {questions[place] for place in order[:count]}
        found[name] = Rows(
            [one for one in asked if one.question not in aside],
            [one for one in asked if one.question in aside],
        )
    return found


def labelled(rows: Sequence[Asked]) -> list[Labelled]:
    """What is asked, and its task."""
    return [Labelled(one.question, one.row.task) for one in rows]


def loop(config: TaskMoEConfig, name: str, *, steps: int) -> FitConfig:
    """The training loop of an expert."""
    pieces = config.gradient_accumulation_steps * PartialState().num_processes
    return FitConfig(
        output=config.output / "runs/experts" / name,
        steps=steps,
        rows=config.micro_batch_size * pieces,
        micro_rows=config.micro_batch_size,
        optimizer=OPTIMIZERS[config.optimizer],
        lr=config.learning_rate,
        schedule=config.lr_scheduler,
        seed=config.seed,
        save_every=config.save_steps,
        **_tracking(config, name),
    )


def _tracking(config: TaskMoEConfig, name: str) -> dict[str, Any]:
    if config.wandb_project is None:
        return {}
    own = {
        "entity": config.wandb_entity,
        "group": config.wandb_name,
        "name": f"{config.wandb_name}-{name}" if config.wandb_name else name,
    }
    return {
        "trackers": ("wandb",),
        "project": config.wandb_project,
        "tracking": {"wandb": {key: value for key, value in own.items() if value}},
    }


def _watch(config: TaskMoEConfig, run: FitConfig, module: nn.Module, write: Any) -> Watch | None:
    if config.wandb_project is None:
        return None
    return watch_by(config.wandb_watch, config.wandb_log_model, module, run, write)


def base_of(config: TaskMoEConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """The base as the experts are trained on it, and asked."""
    with PartialState().main_process_first():
        return load_base(
            config.base_model,
            quantise="4bit" if config.adapter == "qlora" else None,
            kind=config.model_type,
            tokenizer=config.tokenise_model,
        )


def targets_of(config: TaskMoEConfig, model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the layers that get an update."""
    names = set(config.lora_target_modules)
    if config.lora_target_linear:
        head: Any = model.get_output_embeddings()
        names |= {
            path.rpartition(".")[2]
            for path, shape in layer_shapes(model).items()
            if len(shape) == 2 and model.get_submodule(path) is not head
        }
    return tuple(sorted(names))


def _train_experts(config: TaskMoEConfig, rows: Mapping[str, Rows]) -> None:
    missing = [name for name in config.tasks if not (config.shelf / name).exists()]
    for name in config.tasks:
        if name not in missing:
            read_peft(config.shelf / name)  # What cannot be read shows before any work.
            if PartialState().is_main_process:
                print(f"{config.shelf / name}: stands, and is not trained again")
    if not missing:
        return
    model, tokenizer = base_of(config)
    targets = targets_of(config, model)
    check_targets(model, "lora_target_modules", targets)
    encoded = {}
    for name in missing:
        texts = [one.row for one in rows[name].learned]
        encoded[name] = form_of(model).encode_rows(
            texts, tokenizer, context=config.sequence_len, source=f"tasks.{name}"
        )
    for name in missing:
        lora = LoRA(
            name=name,
            rank=config.lora_r,
            alpha=config.lora_alpha,
            targets=targets,
            dropout=config.lora_dropout,
        )
        task, batch = config.tasks[name], loop(config, name, steps=1).rows
        steps = task.steps or math.ceil(task.num_epochs * len(encoded[name]) / batch)
        run = loop(config, name, steps=steps)
        train_expert(
            model,
            encoded[name],
            lora,
            run,
            pad=tokenizer.pad_token_id,
            base=config.base_model,
            output=config.shelf,
            lesson={
                **asdict(lora),
                "base": config.base_model,
                "tokenizer": config.tokenise_model,
                "adapter": config.adapter,
                "data": digest_rows(one.row for one in rows[name].learned),
            },
            watch=lambda module, write, run=run: _watch(config, run, module, write),
        )


def _encoder(config: TaskMoEConfig, kind: Kind) -> str:
    return config.bert_model if kind == "bert" else config.embedding_model


def _lesson(config: TaskMoEConfig, kind: Kind, learned: Sequence[Labelled]) -> dict[str, Any]:
    """What decides a classifier: it stands only for the same."""
    data = digest_contents(json.dumps(asdict(one)).encode() for one in learned)
    return {"tasks": list(config.tasks), "encoder": _encoder(config, kind), "data": data}


def _stands(config: TaskMoEConfig, kind: Kind, learned: Sequence[Labelled]) -> bool:
    """Whether a classifier is trained already; its faults, and its encoder's, show here."""
    folder, lesson = config.output / kind, _lesson(config, kind, learned)
    if not folder.exists():
        encoder_source(f"{kind}_model", lesson["encoder"])
        return False
    header = read_header(folder, kind)
    odd = [name for name, value in lesson.items() if header.get(name) != value]
    if odd:
        raise ValueError(
            f"{folder}: this classifier was trained with other {' and '.join(odd)} "
            f"({', '.join(header['tasks'])}; {header['encoder']}): remove it, or take another "
            "output"
        )
    return True


def _train_classifier(config: TaskMoEConfig, kind: Kind, learned: Sequence[Labelled]) -> None:
    """Train a classifier and write its folder."""
    lesson = _lesson(config, kind, learned)
    if kind == "bert":
        found = BertClassifier.fresh(lesson["tasks"], lesson["encoder"], seed=config.seed)
        _train_bert(config, found, learned, lesson)
    else:
        found = train_embedding(Embedder(lesson["encoder"]), learned, lesson["tasks"])
    if PartialState().is_main_process:
        found.save(config.output / kind, data=lesson["data"])
    PartialState().wait_for_everyone()


def _train_bert(
    config: TaskMoEConfig,
    classifier: BertClassifier,
    learned: Sequence[Labelled],
    lesson: Mapping[str, object],
) -> None:
    rows = config.bert_batch_size
    run = FitConfig(
        output=config.output / "runs/classifier",
        steps=config.bert_steps or math.ceil(config.bert_epochs * len(learned) / rows),
        rows=rows,
        lr=config.bert_learning_rate,
        schedule="linear",
        seed=config.seed,
        save_every=config.save_steps,
        **_tracking(config, "classifier"),
    )
    watch = _watch(config, run, classifier.model, classifier.save)
    train_bert(classifier, learned, run, lesson, watch)


def load_classifier(folder: Path, kind: Kind) -> Classifier:
    """A trained classifier.

    Raises:
        FileNotFoundError: There is none.
    """
    return BertClassifier.load(folder) if kind == "bert" else EmbeddingClassifier.load(folder)


def chosen(config: TaskMoEConfig) -> Kind:
    """The classifier that answers are given by.

    Raises:
        FileNotFoundError: There are two, and they were not judged yet.
        ValueError: What was written of them is damaged.
    """
    if config.classifier is not None:
        return config.classifier
    if len(config.kinds) == 1:
        return config.kinds[0]
    file = config.output / SCORES
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; train the classifiers first")
    scores = read_object(file)
    try:
        losses = {kind: float(scores[kind]["log_loss"]) for kind in config.kinds}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} lacks the scores of {' and '.join(config.kinds)}: train the classifiers again"
        ) from error
    return min(config.kinds, key=losses.__getitem__)


def table(scores: Mapping[Kind, Judged]) -> str:
    """The classifiers on held-out rows, in Markdown."""
    lines = ["| classifier | held-out rows | accuracy | log loss |", "|---|---|---|---|"]
    lines += [
        f"| {kind} | {s.rows} | {s.accuracy:.3f} | {s.log_loss:.3f} |" for kind, s in scores.items()
    ]
    return "\n".join(lines)
