"""The settings of a shelf with a task classifier, in the keys of the system that they are from."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from nlp.task_config import TaskConfig, TaskMoEConfig, read_config

# The README's file of github.com/adithya-s-k/MoLE, with values where it leaves them to the user.
FILE = """
# model arguments
base_model: base
tokenise_model: other
model_type: LlamaForCausalLM

# classifer arguments
bert_classifier: true
embedding_classifier: true

# tasks arguments
tasks:
    plural:
        dataset_name: rows.jsonl
        dataset_subset:
        dataset_split: train[:10]
        prompt_formate: "Plural of {word} ||| {plural}"
        num_epochs: 2
        steps:
    past:
        dataset_name: ORG/NAME
        dataset_subset: verbs
        dataset_split:
        prompt_formate:
        num_epochs: 1
        steps: 30

# lora arguments
adapter: qlora #either lora or qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules:
  - gate_proj
  - q_proj

# training arguments
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002

# wandb arguments to track training
wandb_project: shelf
wandb_entity: team
wandb_watch: gradients
wandb_name: first
wandb_log_model: end

output: out
"""


@pytest.fixture
def read(tmp_path):
    """Reads the file with some keys changed; those that it lacks come last."""

    def read(**changes):
        file = tmp_path / "file.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(FILE), **changes}, sort_keys=False))
        return read_config(file)

    return read


def test_every_key_is_read_as_it_is_spelt(read):
    config = read()
    assert config.tasks == {
        "plural": TaskConfig(
            dataset_name="rows.jsonl",
            dataset_split="train[:10]",
            prompt_formate="Plural of {word} ||| {plural}",
            num_epochs=2.0,
        ),
        "past": TaskConfig(dataset_name="ORG/NAME", dataset_subset="verbs", steps=30),
    }
    given = yaml.safe_load(FILE)
    for name, value in given.items():
        if name not in ("tasks", "output", "lora_target_modules"):
            assert getattr(config, name) == value, name
    assert config.output == Path("out")
    assert config.shelf == Path("out/experts")
    assert config.lora_target_modules == ("gate_proj", "q_proj")
    assert config.kinds == ("bert", "embedding")


def test_keys_without_a_value_have_their_defaults(read):
    tasks = {name: {"dataset_name": "a.jsonl", "steps": None} for name in ("a", "b")}
    empty = dict.fromkeys([field.name for field in fields(TaskMoEConfig)])
    given = {"output": "out", "bert_classifier": True, "lora_target_linear": True}
    config = read(**empty | given | {"tasks": tasks, "learning_rate": "1e-3"})
    assert config.learning_rate == 1e-3
    assert config.base_model == "smollm2-135m-instruct"
    assert config.wandb_project is None
    assert config.kinds == ("bert",)


def test_unknown_keys_are_named_with_the_nearest_known_ones(read):
    tasks = {"a": {"dataset_nam": "x"}, "b": None, "c": {"dataset_name": "y", "prompt_format": "z"}}
    expected = (
        r"unknown key tokenizer_model; the nearest known one is tokenise_model; "
        r"unknown key lora_rank; the nearest known one is lora_\w+; "
        r"unknown key tasks.a.dataset_nam; the nearest known one is dataset_name; "
        r"tasks.a.dataset_name has no value; "
        r"tasks.b is None, expected keys with values; "
        r"unknown key tasks.c.prompt_format; the nearest known one is prompt_formate$"
    )
    with pytest.raises(ValueError, match=expected):
        read(tokenizer_model="x", lora_rank=3, tasks=tasks)
    with pytest.raises(ValueError, match=r"file\.yaml: output has no value$"):
        read(output=None)


def test_all_values_that_are_out_of_range_are_reported_together(read):
    tasks = {"a/b": {"dataset_name": "x", "prompt_formate": "x ||| {y}", "num_epochs": 0}}
    expected = (
        r"tasks.a/b is 'a/b', expected a plain word.*; "
        r"tasks.a/b.prompt_formate: .*prompt is 'x', expected at least one \{column\}; "
        r"tasks.a/b.num_epochs is 0.0, expected a positive number; "
        r"tasks are a/b, expected two or more to tell apart; "
        r"no classifier is chosen: set bert_classifier or embedding_classifier to true; "
        r"lora_r is 0, .*; micro_batch_size is -1, .*; learning_rate is 0.0, .*; "
        r"lora_dropout is 2.0, expected 0 <= lora_dropout < 1; held_out is 1.0, .*; "
        r"optimizer is 'sgd', expected one of adamw, .*; "
        r"lora_target_modules is empty, .*; "
        r"wandb_entity, wandb_watch, wandb_name, wandb_log_model: given without a wandb_project.*; "
        r"wandb_watch is 'weights', expected true, false, gradients, parameters, all$"
    )
    with pytest.raises(ValueError, match=expected):
        read(
            tasks=tasks, bert_classifier=False, embedding_classifier=False, lora_r=0,
            micro_batch_size=-1, learning_rate=0, lora_dropout=2, held_out=1, optimizer="sgd",
            lora_target_linear=False, lora_target_modules=[], wandb_project=None,
            wandb_watch="weights",
        )  # fmt: skip
    with pytest.raises(ValueError, match="classifier is 'bert', and bert_classifier is not true"):
        read(classifier="bert", bert_classifier=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rate": "high", "lora_r": 2.5, "bert_classifier": "perhaps"},
            r"bert_classifier is 'perhaps', expected true or false; "
            r"lora_r is 2\.5, expected a number \(int\); "
            r"learning_rate is 'high', expected a number \(float\)$",
        ),
        ({"adapter": "dora"}, "adapter is 'dora', expected 'lora' or 'qlora'$"),
        ({"classifier": "berta"}, "classifier is 'berta', expected 'bert' or 'embedding'$"),
        ({"lr_scheduler": "step"}, "is 'step', expected 'cosine' or 'linear' or 'constant'$"),
        ({"lora_target_modules": "q_proj"}, "is 'q_proj', expected a list of names$"),
        (
            {"tasks": {"a": {"dataset_name": "x", "steps": "few"}}},
            r"tasks\.a\.steps is 'few', expected a number \(int\)$",
        ),
        ({"tasks": ["a", "b"]}, r"tasks is \['a', 'b'\], expected tasks by name"),
    ],
)
def test_values_of_another_kind_name_their_key(read, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        read(**changes)
    assert "\n" not in str(refused.value)


def test_what_is_no_settings_file_is_refused(tmp_path):
    file = tmp_path / "file.yaml"
    with pytest.raises(FileNotFoundError, match=r"config: .*is no file, expected a YAML file"):
        read_config(file)
    file.write_text("a: [b")
    with pytest.raises(ValueError, match="is no YAML: ") as refused:
        read_config(file)
    assert "\n" not in str(refused.value)
    file.write_text("just words")
    with pytest.raises(ValueError, match="holds 'just words', expected keys with values"):
        read_config(file)
    file.write_text("output: out\ntasks:\n  a: {dataset_name: x}\n  a: {dataset_name: y}\n")
    with pytest.raises(ValueError, match="is no YAML: the key a comes twice"):
        read_config(file)


def test_the_repositorys_own_file_is_in_order():
    config = read_config(Path(__file__).parents[2] / "configs/text_classifier.yaml")
    assert list(config.tasks) == ["past", "plural", "french", "german"]
    assert config.shelf == Path("worlds/text/experts")
