"""From one YAML file to experts, classifiers and answers, on tiny models, the whole way."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType
from datasets import config as datasets_config
from safetensors.torch import load_file

from apps.task_moe import load, main
from mole_vl import read_peft, write_peft
from mole_vl.training import config as settings_of_fit
from nlp import models
from nlp.adapter import blocks
from nlp.task_config import read_config
from nlp.task_moe import chosen, loop, read_rows, targets_of, train
from tests.nlp.families import experts_on
from tests.nlp.toys import quantisable_folder, tiny_encoder, tiny_folder, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LETTERS = {"plural": "abc", "french": "klm"}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes a world and reads its settings, some keys changed."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_folder(tmp_path / "base")
    tiny_encoder(tmp_path / "encoder")
    for name, letters in LETTERS.items():
        words = ["".join(letters[(n + k * n) % 3] for k in range(2 + n)) for n in range(1, 12)]
        rows = [json.dumps({"word": word, "said": word[0]}) + "\n" for word in words]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    given = {
        "base_model": str(tmp_path / "base"),
        "bert_classifier": True,
        "embedding_classifier": True,
        "bert_model": str(tmp_path / "encoder"),
        "embedding_model": str(tmp_path / "encoder"),
        "bert_steps": 40,
        "bert_learning_rate": 3e-3,
        "tasks": {
            name: {
                "dataset_name": str(tmp_path / f"{name}.jsonl"),
                "prompt_formate": name + " of {word}: ||| {said}",
            }
            for name in LETTERS
        },
        "adapter": "lora",
        "lora_r": 2,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "gradient_accumulation_steps": 2,
        "micro_batch_size": 2,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "output": str(tmp_path / "out"),
    }

    def read(**changes):
        file = tmp_path / "file.yaml"
        file.write_text(yaml.safe_dump({**given, **changes}, sort_keys=False))
        return read_config(file)

    return read


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_from_a_file_to_answers(read, tmp_path, capsys):
    read()
    file = str(tmp_path / "file.yaml")
    main(["train", "--config", file])
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "out/classifiers.json").read_text())
    assert {score["rows"] for score in scores.values()} == {2}
    assert scores["bert"]["accuracy"] == scores["embedding"]["accuracy"] == 1.0
    best = min(scores, key=lambda kind: scores[kind]["log_loss"])
    assert f"answers are given by the {best} classifier" in said
    for name in LETTERS:
        assert any(
            v.any() for k, v in factors(tmp_path / f"out/experts/{name}").items() if "_B" in k
        )
    main(["ask", "--config", file, "--max_new_tokens", "3", "--hard", "cab", "klmk"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"by the {best} classifier", "cab"]
    assert [line.split()[1] for line in lines[2:4]] == ["plural", "french"]
    assert lines[4] == "  adapter: plural x 1.000"
    assert lines[9] == "  adapter: french x 1.000"
    (found,) = load(read_config(tmp_path / "file.yaml"))("cab", max_new_tokens=3, do_sample=False)
    assert found.prompt == "plural of cab:"
    assert 0.5 < found.probabilities["plural"] < 1


def test_what_stands_is_not_trained_again(read, tmp_path, capsys):
    model = tiny_model()
    for one in experts_on(model, blocks(model), ("plural", "french")):
        write_peft(one, tmp_path / "shelf" / one.name)
    config = read(experts=str(tmp_path / "shelf"), bert_classifier=False)
    files = [
        tmp_path / "shelf/plural/adapter_model.safetensors",
        tmp_path / "out/embedding/head.safetensors",
    ]
    train(config)
    before = [file.stat().st_mtime_ns for file in files]
    train(config)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert "stands, and is not trained again" in capsys.readouterr().out
    assert not (tmp_path / "out/runs").exists()
    # Experts alone may stand elsewhere; a classifier is for its tasks, rows and encoder alone.
    with pytest.raises(
        ValueError, match=r"out.embedding: this classifier was trained with other d"
    ):
        train(replace(config, held_out=0.5))
    with pytest.raises(
        ValueError, match=r"with other tasks and data .*plural, french; .*remove it"
    ):
        train(replace(config, tasks={**config.tasks, "more": config.tasks["plural"]}))


def test_one_expert_is_what_the_settings_say(read, tmp_path):
    config = read()
    config = replace(
        config,
        tasks={
            "plural": replace(config.tasks["plural"], num_epochs=2),
            "french": replace(config.tasks["french"], steps=2),
        },
    )
    train(config)
    logs = {
        name: [
            json.loads(line)
            for line in (tmp_path / f"out/runs/experts/{name}/metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        for name in LETTERS
    }
    # Two epochs of ten rows, four a step; two steps.
    assert logs["plural"][-1]["step"] == 5
    assert logs["french"][-1]["step"] == 2
    expert = read_peft(tmp_path / "out/experts/plural")
    assert {path.rpartition(".")[2] for path in expert.layers} == {"q_proj", "v_proj"}
    assert {(one.rank, one.scale) for one in expert.layers.values()} == {(2, 4.0)}
    # Pieces of a batch are no other batch: as one piece the same expert is found.
    whole = replace(
        config,
        output=tmp_path / "whole",
        gradient_accumulation_steps=1,
        micro_batch_size=4,
        lora_dropout=0.0,
    )
    pieces = replace(config, output=tmp_path / "pieces", lora_dropout=0.0)
    for one in (whole, pieces):
        train(one)
    for key, value in factors(whole.shelf / "plural").items():
        torch.testing.assert_close(
            factors(pieces.shelf / "plural")[key], value, atol=1e-3, rtol=1e-2
        )


def test_rows_kept_aside_are_not_learned_from(read, tmp_path):
    file = tmp_path / "plural.jsonl"
    file.write_text(file.read_text() * 2)  # Every question twice.
    for share in (0.01, 0.3, 0.99):
        rows = read_rows(read(held_out=share))
        for own in rows.values():
            learned, aside = (
                {one.question for one in part} for part in (own.learned, own.held_out)
            )
            assert len(learned | aside) == 11
            assert not learned & aside
            assert len(aside) == min(max(1, round(share * 11)), 10)
        assert len(rows["plural"].learned) + len(rows["plural"].held_out) == 22
    assert read_rows(read(seed=1, held_out=0.5)) != read_rows(read(held_out=0.5))


def test_the_loop_is_as_the_keys_say(read):
    run = loop(read(optimizer="adamw_bnb_8bit", lr_scheduler="linear", seed=3), "past", steps=7)
    assert (run.rows, run.micro_rows, run.steps, run.seed) == (4, 2, 7, 3)
    assert (run.optimizer, run.schedule, run.lr) == ("adamw8bit", "linear", 0.01)
    assert run.trackers == ()


def test_all_linear_layers_are_all_but_the_head(read):
    names = targets_of(read(lora_target_linear=True), tiny_model())
    assert names == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    )  # fmt: skip
    only = read(lora_target_linear=False, lora_target_modules=["v_proj"])
    assert targets_of(only, tiny_model()) == ("v_proj",)


def test_a_base_in_four_bits_is_trained_on_and_asked(read, tmp_path):
    quantisable_folder(tmp_path / "big")
    config = read(
        base_model=str(tmp_path / "big"), adapter="qlora", optimizer="adamw_bnb_8bit",
        bert_classifier=False, model_type="llama", tokenise_model=str(tmp_path / "big"),
    )  # fmt: skip
    train(config)
    routed = load(config)
    assert routed.pipe.model.config.quantization_config.load_in_4bit
    (found,) = routed("cab", max_new_tokens=2, do_sample=False)
    assert found.probabilities.keys() == LETTERS.keys()


class Wandb:
    """A double of the package, which keeps what it is told."""

    def __init__(self):
        self.runs, self.config = [], SimpleNamespace(update=lambda values, **_: None)

    def init(self, **given):
        run = SimpleNamespace(given=given, watched=[], logged=[], artifacts=[], ended=False)
        run.watch = lambda module, **how: run.watched.append(how)
        run.log = lambda values, step=None, **_: run.logged.append((step, values))
        run.log_artifact = lambda path, name, type: run.artifacts.append(
            (name, type, read_peft(path) if name in LETTERS else path)
        )
        run.finish = lambda: setattr(run, "ended", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    double = Wandb()
    here = [*tracking.get_available_trackers(), LoggerType.WANDB]
    monkeypatch.setitem(sys.modules, "wandb", double)
    monkeypatch.setattr(tracking, "_available_trackers", here)
    return double


@pytest.mark.parametrize(("kept", "times"), [("end", 1), (True, 1), ("checkpoint", 3), (False, 0)])
def test_wandb_is_told_what_the_keys_say(read, wandb, kept, times):
    config = read(
        wandb_project="shelf", wandb_entity="team", wandb_name="first", wandb_watch=True,
        wandb_log_model=kept, save_steps=1, bert_steps=3, embedding_classifier=False,
    )  # fmt: skip
    train(config)
    given = [run.given for run in wandb.runs]
    common = {"project": "shelf", "entity": "team", "group": "first"}
    names = ["first-plural", "first-french", "first-classifier"]
    assert given == [{**common, "name": name} for name in names]
    for run, name in zip(wandb.runs, [*LETTERS, "classifier"], strict=True):
        assert run.watched == [{"log": "gradients", "log_freq": 10}]
        assert run.logged[-1][0] == 3
        assert run.ended
        assert [artifact[:2] for artifact in run.artifacts] == [(name, "model")] * times
    if times:
        expert = wandb.runs[0].artifacts[-1][2]
        assert expert.digest == read_peft(config.shelf / "plural").digest


def test_without_a_project_or_more_wandb_is_told_no_more(read, wandb):
    config = read(wandb_project="shelf", bert_steps=1, embedding_classifier=False)
    train(config)
    assert [run.given for run in wandb.runs] == [
        {"project": "shelf", "name": name} for name in ("plural", "french", "classifier")
    ]
    assert not any(run.watched or run.artifacts for run in wandb.runs)


def test_faults_come_before_any_training(read, tmp_path, monkeypatch):
    read()
    tasks = yaml.safe_load((tmp_path / "file.yaml").read_text())["tasks"]
    one = tmp_path / "one.jsonl"
    one.write_text('{"word": "a", "said": "b"}\n' * 3)
    empty = tmp_path / "empty.csv"
    empty.write_text("word,said\n")

    def mistaken(**changes):
        return read(tasks={**tasks, "french": {**tasks["french"], **changes}})

    mistakes = [
        (mistaken(dataset_name="gone.jsonl"), "tasks.french.dataset_name: gone.jsonl, .*no such"),
        (mistaken(dataset_name=str(empty)), "tasks.french.dataset_name: .*empty.csv"),
        (mistaken(dataset_name=str(one)), "tasks.french: one question, expected two or more"),
        (mistaken(prompt_formate="{text} ||| {said}"),
         r"tasks.french.dataset_name: .*: no column 'text', .* \(found word, said\)$"),
        (read(lora_target_modules=["query"]), "'query' names no layer of LlamaForCausalLM"),
        (read(sequence_len=5), r"tasks.plural: longer than the context of 5 tokens: row 0"),
        (read(model_type="mistral"), "a llama or .*, expected mistral"),
        (read(tokenise_model="gone"), "tokenizer is 'gone', expected a folder"),
        (read(bert_model="gone"), "bert_model is 'gone', expected a folder"),
        (read(embedding_model="gone"), "embedding_model is 'gone', expected a folder"),
    ]  # fmt: skip
    for config, message in mistakes:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
            train(config)
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(settings_of_fit, "get_available_trackers", list)
    with pytest.raises(ValueError, match="'wandb', whose package is not installed: pip install wa"):
        train(read(wandb_project="shelf"))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="'4bit', which needs the package bitsandbytes"):
        train(read(adapter="qlora", embedding_classifier=False))
    assert not (tmp_path / "out/runs").exists()
    assert not (tmp_path / "out/experts").exists()


def test_what_was_not_trained_cannot_be_asked(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no expert in .*plural, .*french: train first"):
        load(read())
    with pytest.raises(FileNotFoundError, match=r"classifiers.json: no such file; train the clas"):
        chosen(read())
    for content in ("{}", '{"bert": {"log_loss": 0.1}}', '{"bert": 1, "embedding": 2}'):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/classifiers.json").write_text(content)
        with pytest.raises(ValueError, match=r"lacks the scores of bert and embedding: train the"):
            chosen(read())
    assert chosen(read(classifier="bert")) == "bert"
    assert chosen(read(bert_classifier=False)) == "embedding"
