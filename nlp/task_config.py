"""The settings of a shelf of task experts with a task classifier: one YAML file.

Its keys are those of github.com/adithya-s-k/MoLE, as spelt there, and a few more. A key without a
value has its default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mole_vl.faults import at_least, one_of, plain_word, positive, refuse, share
from mole_vl.files import check_file, read_text
from mole_vl.training.optimizers import Rule
from nlp.classifier import Kind
from nlp.dataset import DatasetRows
from nlp.encoders import BUILT_IN_ENCODER
from nlp.keys import values_of
from nlp.models import BUILT_IN
from nlp.templates import Template, divided
from nlp.wandb_watch import switch_faults

OPTIMIZERS: Mapping[str, Rule] = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "muon": "muon",
}
"""The optimisers of `fit` by the names that transformers' Trainer has for them, and their own."""

_SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task.

    Args:
        dataset_name: A file (.csv, .tsv, .json, .jsonl, .parquet), a folder of such, or a Hub id.
        dataset_subset: Which of the data set's configurations.
        dataset_split: Which rows, as `datasets` writes it: train, train[:1000] ...
        prompt_formate: How its columns become a prompt and, behind |||, the answer; see
            `nlp.templates`.
        num_epochs: How often the expert sees each row.
        steps: Optimiser steps of the expert, in place of epochs.
    """

    dataset_name: str
    dataset_subset: str | None = None
    dataset_split: str = "train"
    prompt_formate: str = "{prompt} ||| {answer}"
    num_epochs: float = 1
    steps: int | None = None

    def faults(self, name: str) -> list[str | None]:
        """What is wrong with the task of this name, None for each check that passed."""
        where = f"tasks.{name}"
        return [
            plain_word(where, name),
            self._fault_of_rows(name),
            positive(f"{where}.num_epochs", self.num_epochs),
            at_least(f"{where}.steps", self.steps, 1),
        ]

    def _fault_of_rows(self, name: str) -> str | None:
        if not self.dataset_name:
            return f"tasks.{name}.dataset_name is empty, expected a file, a folder or a Hub id"
        try:
            self.rows(name)
        except ValueError as fault:
            return f"tasks.{name}.prompt_formate: {fault}"
        return None

    def rows(self, name: str) -> DatasetRows:
        """Its rows: where they are, and the form of their prompts and answers."""
        prompt, answer = divided(self.prompt_formate)
        return DatasetRows(
            dataset=self.dataset_name,
            subset=self.dataset_subset,
            split=self.dataset_split,
            prompt=prompt,
            answer=answer,
            # It is a template too, and a brace in a name is no column's.
            task=name.replace("{", "{{").replace("}", "}}"),
        )


@dataclass(frozen=True, kw_only=True)
class TaskMoEConfig:
    """A base, an expert for each task, and the classifiers that choose among them.

    Args:
        tasks: The tasks by name, two or more; an expert's folder has its task's name.
        output: Folder of the classifiers, the runs, and, but for `experts`, the experts.
        experts: Folder of the experts; those that stand there are taken as they are.
        base_model: A Hub id, a folder, or smollm2-135m-instruct (by pip).
        tokenise_model: Another tokenizer than the base's own, by Hub id or folder.
        model_type: What the base must be, such as llama or LlamaForCausalLM.
        bert_classifier: Whether a fine-tuned encoder is trained to tell the tasks apart.
        embedding_classifier: Whether a linear head over sentence embeddings is.
        classifier: Which of the two answers are given by: bert or embedding; if not given, the one
            of lower log loss on the held-out rows.
        bert_model: What is fine-tuned: a Hub id, a folder, or all-minilm-l6-v2 (by pip).
        bert_epochs: How often it sees each row.
        bert_steps: Its optimiser steps, in place of epochs.
        bert_batch_size: Rows of each of its steps.
        bert_learning_rate: Its peak learning rate.
        embedding_model: What gives the embeddings: a Hub id, a folder, or all-minilm-l6-v2.
        held_out: Share of each task's rows that neither experts nor classifiers learn from.
        adapter: lora, or qlora, which keeps the base in 4 bits (needs bitsandbytes).
        lora_r: Rank of the experts.
        lora_alpha: The experts' updates count alpha / r times.
        lora_dropout: Share of an update's inputs that a training step leaves out.
        lora_target_linear: Whether all linear layers but the output head get an update.
        lora_target_modules: Names of layers that do, beside those.
        gradient_accumulation_steps: Pieces of a step's rows in each process.
        micro_batch_size: Rows of a piece.
        optimizer: adamw, adamw_torch; adamw_bnb_8bit, adamw_8bit (need bitsandbytes); or muon.
        lr_scheduler: cosine, linear or constant.
        learning_rate: Peak learning rate of the experts.
        sequence_len: The most tokens of a prompt with its answer.
        save_steps: Steps between checkpoints.
        seed: Seed of everything random.
        wandb_project: The wandb project that runs are filed under; without one there are none.
        wandb_entity: Whose project it is.
        wandb_watch: What wandb sees of the trained weights: gradients (or true), parameters, all.
        wandb_name: The runs' group, and the beginning of their names.
        wandb_log_model: Whether wandb gets what was trained: at the end (or true), or with each
            checkpoint.
    """

    tasks: dict[str, TaskConfig]
    output: Path
    experts: Path | None = None
    base_model: str = BUILT_IN
    tokenise_model: str | None = None
    model_type: str | None = None
    bert_classifier: bool = False
    embedding_classifier: bool = False
    classifier: Kind | None = None
    bert_model: str = BUILT_IN_ENCODER
    bert_epochs: float = 3
    bert_steps: int | None = None
    bert_batch_size: int = 16
    bert_learning_rate: float = 5e-5
    embedding_model: str = BUILT_IN_ENCODER
    held_out: float = 0.1
    adapter: Literal["lora", "qlora"] = "lora"
    lora_r: int = 32
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    lora_target_linear: bool = False
    lora_target_modules: tuple[str, ...] = ()
    gradient_accumulation_steps: int = 4
    micro_batch_size: int = 2
    optimizer: str = "adamw_bnb_8bit"
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    learning_rate: float = 2e-4
    sequence_len: int = 1024
    save_steps: int = 100
    seed: int = 0
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_watch: bool | str = False
    wandb_name: str | None = None
    wandb_log_model: bool | str = False

    def __post_init__(self) -> None:
        rates = {
            "lora_alpha": self.lora_alpha,
            "learning_rate": self.learning_rate,
            "bert_learning_rate": self.bert_learning_rate,
            "bert_epochs": self.bert_epochs,
        }
        counts = {
            "lora_r": self.lora_r,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "micro_batch_size": self.micro_batch_size,
            "bert_batch_size": self.bert_batch_size,
            "bert_steps": self.bert_steps,
            "save_steps": self.save_steps,
        }
        refuse(
            "TaskMoEConfig",
            [
                *(fault for name, task in self.tasks.items() for fault in task.faults(name)),
                *self._faults_of_choice(),
                *(at_least(name, value, 1) for name, value in counts.items()),
                *(positive(name, value) for name, value in rates.items()),
                at_least("sequence_len", self.sequence_len, 2),
                at_least("seed", self.seed, 0),
                share("lora_dropout", self.lora_dropout),
                None
                if 0 < self.held_out < 1
                else f"held_out is {self.held_out}, expected a share between 0 and 1",
                one_of("adapter", self.adapter, ("lora", "qlora")),
                one_of("optimizer", self.optimizer, OPTIMIZERS),
                one_of("lr_scheduler", self.lr_scheduler, _SCHEDULES),
                None
                if self.lora_target_linear or self.lora_target_modules
                else "lora_target_modules is empty, expected names of linear layers, or "
                "lora_target_linear: true for all of them",
                *self._faults_of_wandb(),
            ],
        )

    def _faults_of_choice(self) -> list[str | None]:
        kinds = self.kinds
        return [
            None
            if len(self.tasks) > 1
            else f"tasks are {', '.join(self.tasks) or 'none'}, expected two or more to tell apart",
            None
            if kinds
            else "no classifier is chosen: set bert_classifier or embedding_classifier to true",
            f"classifier is {self.classifier!r}, and {self.classifier}_classifier is not true"
            if kinds and self.classifier is not None and self.classifier not in kinds
            else None,
        ]

    def _faults_of_wandb(self) -> list[str | None]:
        given = ["wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model"]
        lost = [name for name in given if getattr(self, name)]
        return [
            f"{', '.join(lost)}: given without a wandb_project, so that nothing would be logged"
            if lost and not self.wandb_project
            else None,
            *switch_faults(self.wandb_watch, self.wandb_log_model),
        ]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The classifiers that are trained."""
        chosen = {"bert": self.bert_classifier, "embedding": self.embedding_classifier}
        return tuple(kind for kind in get_args(Kind) if chosen[kind])

    @property
    def shelf(self) -> Path:
        """Where the experts stand."""
        return self.experts or self.output / "experts"

    def templates(self) -> dict[str, Template]:
        """The form of each task's prompts."""
        return {name: Template(task.rows(name).prompt) for name, task in self.tasks.items()}


class _OneOfEach(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML's own loader forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key} comes twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_config(file: Path) -> TaskMoEConfig:
    """The settings in a YAML file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No YAML; unknown keys, each with the known one that it is most like; keys that
            are missing; values of another kind or out of range.
    """
    check_file("config", file, "a YAML file")
    try:
        given = yaml.load(read_text(file), _OneOfEach)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file} holds {given!r}, expected keys with values")
    tasks = given.get("tasks") or {}
    if not isinstance(tasks, dict):
        raise ValueError(f"{file}: tasks is {tasks!r}, expected tasks by name")
    rest = {key: value for key, value in given.items() if key != "tasks"}
    outer, faults = values_of(rest, TaskMoEConfig, aside=["tasks"])
    inner: dict[str, TaskConfig] = {}
    if not tasks:
        faults.append("tasks has no value")
    for name, one in tasks.items():
        if not isinstance(one, dict):
            faults.append(f"tasks.{name} is {one!r}, expected keys with values")
            continue
        values, odd = values_of(one, TaskConfig, f"tasks.{name}.")
        faults += odd
        if not odd:
            inner[str(name)] = TaskConfig(**values)
    refuse(str(file), faults)
    try:
        return TaskMoEConfig(**outer, tasks=inner)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
