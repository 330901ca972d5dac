"""MoLA trained on questions and on whole texts, from the flags of its authors."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mole_vl.mixture_folder import mix_saved
from nlp.adapter import blocks, bound
from nlp.answers import log_likelihood
from nlp.data import TextRow
from nlp.models import load_base
from nlp.scienceqa.asking import load_asked
from nlp.scienceqa.config import InstructionConfig, TrainConfig, mola_of
from nlp.scienceqa.encoding import encode
from nlp.scienceqa.template import ALPACA
from nlp.scienceqa.train import train, train_instruction
from nlp.task import LanguageTask
from tests.nlp.families import T5
from tests.nlp.scienceqa_place import (  # place is a fixture
    place as place,
    results,
    same,
    settings,
    tensors,
    typed,
)
from tests.nlp.scienceqa_toys import (
    as_json,
    base,
    wordnet_package,
)
from tests.nlp.test_task_moe import Wandb, wandb as wandb  # a fixture


def test_the_flags_are_the_mixture_and_the_loop(place, tmp_path):
    config = settings(
        place, tmp_path, number_experts="3,4", top_k="1,2", lora_r="2,4", lora_alpha=8.0,
        lora_dropout=0.1, lora_target_modules="q_proj, up_proj", obalance=True, seed=5,
        batch_size=6, num_epochs=250, learning_rate=3e-4,
    )  # fmt: skip
    model, _ = load_base(config.base_model)
    method = mola_of(config, model, blocks(model))
    assert (method.experts, method.top_k, method.rank) == ((3, 4), (1, 2), (2, 4))
    assert (method.alpha, method.dropout, method.balance, method.seed) == (8.0, 0.1, 0.001, 5)
    assert method.targets == ("q_proj", "up_proj")
    run = config.loop(12)
    assert (run.rows, run.micro_rows, run.steps, run.warmup) == (6, 2, 500, 50)
    assert (run.lr, run.schedule, run.optimizer, run.clip) == (3e-4, "linear", "adamw", 1.0)
    assert run.output == tmp_path / "mola_run"
    assert config.loop(12000).warmup == 100
    plain = TrainConfig(base_model=config.base_model)
    shaped = mola_of(plain, model, blocks(model))
    assert (shaped.experts, shaped.top_k, shaped.rank) == ((2, 6), (2, 2), (8, 8))
    assert shaped.balance == 0.0 and len(shaped.targets) == 7
    assert InstructionConfig().obalance and InstructionConfig().num_epochs == 3


@pytest.mark.parametrize("inputs", [True, False])
def test_a_first_step_is_the_base_on_all_tokens_or_on_the_answers(place, tmp_path, inputs):
    config = settings(place, tmp_path, batch_size=12, micro_batch_size=3, train_on_inputs=inputs)
    train(config)
    line = json.loads((config.run / "metrics.jsonl").read_text())
    model, fast = load_base(config.base_model)
    rows = datasets.load_from_disk(config.data_path)["train"].to_list()
    sums, count = 0.0, 0
    for row in rows:
        prompt = ALPACA.prompt(row["instruction"])
        ids = torch.tensor([[*fast(prompt + row["output"])["input_ids"], 1]])
        shown = 1 if inputs else len(fast(prompt)["input_ids"])
        logits = model(ids).logits[0, shown - 1 : -1].log_softmax(-1)
        sums -= logits.gather(1, ids[0, shown:, None]).sum().item()
        count += ids.shape[1] - shown
    assert line["lm"] == pytest.approx(sums / count, rel=1e-5)
    assert "balance" not in line


def test_the_end_of_an_answer_is_learned_or_not(place, tmp_path, monkeypatch):
    ends = {}
    sizes = LanguageTask.sizes

    for end in (True, False):
        config = settings(place, tmp_path / str(end), add_eos_token=end, group_by_length=True)
        monkeypatch.setattr(
            LanguageTask, "sizes", lambda self, end=end: ends.setdefault(end, sizes(self))
        )
        train(config)
    assert ends[True] == [size + 1 for size in ends[False]]


def test_rows_of_like_length_come_together(place, tmp_path, monkeypatch):
    rows = [
        {"instruction": "rock " * (1 + n % 4 * 20), "input": "", "output": "milk"}
        for n in range(16)
    ]
    table = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    table.save_to_disk(tmp_path / "rows.hf")
    widths = {}
    batch = LanguageTask.batch

    def seen(self, given):
        found = batch(self, given)
        widths[grouped].append({int(one.sum()) for one in found["attention_mask"]})
        return found

    monkeypatch.setattr(LanguageTask, "batch", seen)
    for grouped in (True, False):
        widths[grouped] = []
        train(
            settings(
                place, tmp_path / str(grouped), data_path=str(tmp_path / "rows.hf"),
                group_by_length=grouped, micro_batch_size=4,
            )
        )  # fmt: skip
    assert [len(lengths) for lengths in widths[True]] == [1] * 4
    assert max(len(lengths) for lengths in widths[False]) > 1


def test_long_rows_are_cut_and_counted(place, tmp_path, capsys):
    train(settings(place, tmp_path, cutoff_len=40))
    assert "12 of 12 rows have more than 40 tokens, and lose the beginning of their" in (
        capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="answers that leave no room for a prompt within 4 tokens"):
        train(settings(place, tmp_path / "short", cutoff_len=4))


def test_rows_are_held_out_and_their_loss_is_told(place, tmp_path, capsys):
    config = settings(place, tmp_path, val_set_size=0.25, batch_size=3, micro_batch_size=1,
                      num_epochs=2, save_steps=2)  # fmt: skip
    train(config)
    losses = results(config.run / "held_out.json")
    assert list(losses) == ["2", "4", "6"] and config.held_out(12) == 3
    assert f"held-out loss {losses['6']:.4f}" in capsys.readouterr().out
    model, fast = load_base(config.base_model)
    mixture = mix_saved(model, config.output_dir, blocks=blocks(model))
    rows = [
        encode(TextRow(ALPACA.prompt(row["instruction"]), row["output"], ""), fast, inputs=True,
               end=True)
        for row in datasets.load_from_disk(config.data_path)["train"]
    ]  # fmt: skip
    told = log_likelihood(model, fast, rows, around=bound(mixture))
    sums = [-(a + b + c) / 3 for i, a in enumerate(told) for j, b in enumerate(told[:i])
            for c in told[:j]]  # fmt: skip
    assert min(abs(one - losses["6"]) for one in sums) < 1e-5
    with pytest.raises(ValueError, match=r"val_set_size is 12, and .* has 12 rows: none would be"):
        train(settings(place, tmp_path / "all", val_set_size=12))


def test_a_run_that_was_broken_off_goes_on_to_the_same_weights(place, tmp_path, monkeypatch):
    how = {"num_epochs": 4, "val_set_size": 2, "save_steps": 3, "lora_dropout": 0.2}
    whole = settings(place, tmp_path / "whole", **how)
    train(whole)
    broken = settings(place, tmp_path / "broken", **how)

    def stops(self, progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlp.scienceqa.train.HeldOut.__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert not broken.output_dir.exists()
    train(broken)
    assert same(tensors(whole.output_dir), tensors(broken.output_dir))
    before = tensors(broken.output_dir)
    train(broken)  # Done already: it is written again.
    assert same(before, tensors(broken.output_dir))
    with pytest.raises(
        ValueError, match=r"was made with other settings .*cutoff_len was 256, is 99"
    ):
        train(replace(broken, cutoff_len=99))


def test_a_training_begins_with_a_mixture_that_was_trained(place, tmp_path):
    first = settings(place, tmp_path / "first")
    train(first)
    more = {"output_dir": tmp_path / "more/mola", "learning_rate": 1e-12}
    train(settings(place, tmp_path, resume_from_checkpoint=str(first.output_dir), **more))
    begun, end = tensors(first.output_dir), tensors(tmp_path / "more/mola")
    assert all(torch.allclose(begun[key], end[key], atol=1e-6) for key in begun)
    with pytest.raises(
        FileNotFoundError, match=r"mixture: .*gates.* is no file, expected the gates"
    ):
        train(settings(place, tmp_path / "x", resume_from_checkpoint=str(tmp_path / "nothing")))
    with pytest.raises(
        ValueError, match=r"expert0 at model.layers.0.* has rank 8 and scale 2 there"
    ):
        train(
            settings(place, tmp_path / "y", resume_from_checkpoint=str(first.output_dir), lora_r=4)
        )


def test_whole_texts_are_learned_before_a_task(place, tmp_path, capsys):
    texts = [{"input": None, "instruction": None, "output": "rock milk " * n} for n in range(1, 30)]
    table = datasets.DatasetDict(train=datasets.Dataset.from_list(texts))
    table.save_to_disk(tmp_path / "meta.hf")
    typed(
        tmp_path, "train_instruction", "--base_model", place / "base", "--data_path", "meta.hf",
        "--output_dir", "before", "--batch_size", 8, "--micro_batch_size", 8, "--num_epochs", 1,
        "--cutoff_len", 32, "--val_set_size", 1, "--number_experts", 2, "--train_on_inputs",
        "--add_eos_token", "--prompt_template_name_meta", "meta", "--load_in_8bit", "false",
    )  # fmt: skip
    assert "rows have more than 32 tokens, and lose their end" in capsys.readouterr().out
    line = json.loads((tmp_path / "before_run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["balance"] > 1.9 and line["step"] == 4
    # What was learned so is where the task's training begins.
    typed(
        tmp_path, "train", "--base_model", place / "base", "--data_path",
        place / "sqa/science_qa.hf", "--output_dir", "after", "--batch_size", 4,
        "--micro_batch_size", 4, "--number_experts", 2, "--resume_from_checkpoint", "before",
    )  # fmt: skip
    assert (tmp_path / "after/gates/model.safetensors").is_file()
    first = InstructionConfig(
        base_model=str(place / "base"), data_path=str(tmp_path / "meta.hf"), batch_size=29,
        micro_batch_size=29, num_epochs=1, val_set_size=0, cutoff_len=32, obalance=False,
        output_dir=tmp_path / "one", number_experts=2,
    )  # fmt: skip
    train_instruction(first)
    line = json.loads((tmp_path / "one_run/metrics.jsonl").read_text())
    model, fast = load_base(str(place / "base"))
    sums, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*fast(text["output"])["input_ids"], 1][:32]])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        sums -= logits.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert line["lm"] == pytest.approx(sums / count, rel=1e-5)


def test_questions_made_from_wordnet_go_the_whole_way(place, tmp_path, capsys):
    wordnet_package(tmp_path / "npm")
    typed(tmp_path, "prepare", "--dataset", "wordnet", "--packages", "npm", "--save_path", "qa")
    (tmp_path / "settings.yaml").write_text(
        f"base_model: {place / 'base'}\ndata_path: qa/science_qa.hf\noutput_dir: mola\n"
        "number_experts: [2, 3]\nlora_r: 4,8\ntop_k: 2\nlora_target_modules: [q_proj, up_proj]\n"
        "group_by_length: true\nnum_epochs: 0.05\nbatch_size: 16\n"
    )
    typed(tmp_path, "train", "--config", "settings.yaml", "--micro_batch_size", 16)
    assert "3 steps" in capsys.readouterr().out
    typed(
        tmp_path, "evaluate", "--test_dataset", "qa/scienceq_validation.json", "--base_model",
        place / "base", "--mola_weights", "mola", "--save_path", "r.json", "--batch_size", 64,
        "--max_new_tokens", 2, "--number_experts", "2,3", "--lora_target_modules",
        "up_proj,q_proj",
    )  # fmt: skip
    asked = results(tmp_path / "qa/scienceq_validation.json")
    assert results(tmp_path / "r.json")["answers"] == [row["answer"] for row in asked]


def test_a_base_in_eight_bits_is_trained_on_and_asked(tmp_path, place):
    base(tmp_path / "base", width=64)
    config = settings(tmp_path, tmp_path, data_path=str(place / "sqa/science_qa.hf"),
                      load_in_8bit=True, batch_size=12, micro_batch_size=12)  # fmt: skip
    train(config)
    asked = load_asked(config.base_model, config.output_dir, bits=True)
    assert asked.model.config.quantization_config.load_in_8bit
    assert isinstance(asked(["Pick rock."], tokens=2)[0], str)


def test_wandb_is_told_what_the_flags_say(place, tmp_path, wandb: Wandb):
    config = settings(
        place, tmp_path, wandb_project="mola", wandb_run_name="first", wandb_watch="all",
        wandb_log_model=True, val_set_size=2, num_epochs=2, save_steps=3,
    )  # fmt: skip
    train(config)
    (run,) = wandb.runs
    assert run.given["project"] == "mola" and run.given["name"] == "first"
    assert run.watched == [{"log": "all", "log_freq": 10}]
    assert [(name, kind) for name, kind, _ in run.artifacts] == [("mola_run", "model")]
    assert [step for step, values in run.logged if "held-out loss" in values] == [3, 5]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_r": "8,8,8"}, "lora_r has 3 numbers, and the model has 2 layers with lora_target"),
        ({"number_experts": "2,2,2"}, "number_experts has 3 numbers, and the model has 2 layers"),
        ({"top_k": (2,)}, "top_k has 1 numbers, and the model has 2 layers"),
        ({"top_k": "2,4"}, "top_k is 4 in layer 1, which has 3 experts by number_experts"),
        ({"lora_target_modules": "w1"}, "targets of lora_target_modules: 'w1' names no layer"),
        ({"lora_target_modules": "q_proj,lm_head"}, "lm_head lies in no layer"),
        (
            {"lora_target_modules": "lm_head", "number_experts": "2,2"},
            "lora_target_modules: lm_head lies in no layer",
        ),
        ({"data_path": "nothing.json"}, "data_path: nothing.json, was not loaded: there is no"),
        ({"prompt_template_name": "x"}, "prompt_template_name: templates.x.json is no file"),
        ({"base_model": "nowhere"}, "base is 'nowhere', expected a folder, a Hub id"),
    ],
)
def test_what_does_not_fit_is_told_before_any_step(place, tmp_path, changes, told):
    config = settings(place, tmp_path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        train(config)
    assert not config.run.exists() and not config.output_dir.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "batch_size is 8 and micro_batch_size 3: the"),
        ({"batch_size": 4, "micro_batch_size": 8}, "batch_size is 4 and micro_batch_size 8: the"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0, expected at least 1"),
        ({"lora_r": "8,a"}, "lora_r is '8,a', expected a whole number, or one for each layer"),
        ({"number_experts": "squares"}, "number_experts is 'squares', expected a whole number"),
        ({"lora_target_modules": ""}, "lora_target_modules is '', expected names with commas"),
        ({"val_set_size": 1.5}, "val_set_size is 1.5, expected a number of rows or a share"),
        ({"val_set_size": -1}, "val_set_size is -1, expected"),
        ({"cutoff_len": 1}, "cutoff_len is 1, expected at least 2"),
        ({"num_epochs": 0}, "num_epochs is 0, expected a positive number"),
        ({"wandb_watch": "all"}, "wandb_watch: given without a wandb_project"),
        ({"wandb_project": "x", "wandb_watch": "some"}, "wandb_watch is 'some', expected true"),
        ({"data_path": ""}, "data_path is empty"),
    ],
)
def test_settings_that_cannot_be_are_told(changes, told):
    with pytest.raises(ValueError, match=told):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_on_inputs": False}, "train_on_inputs is false, and a text here has no input"),
        ({"prompt_template_name_meta": "x"}, "prompt_template_name_meta is 'x', expected one of"),
    ],
)
def test_settings_of_whole_texts_that_cannot_be_are_told(changes, told):
    with pytest.raises(ValueError, match=told):
        InstructionConfig(**changes)


def test_rows_without_text_are_told(place, tmp_path):
    file = as_json(tmp_path / "rows.json", [{"instruction": None, "output": "x"}, {"output": ""}])
    with pytest.raises(ValueError, match="row 0: instruction is None, expected some text; row 1"):
        train(settings(place, tmp_path, data_path=str(file)))
    with pytest.raises(ValueError, match="row 1: output is '', expected some text"):
        train_instruction(InstructionConfig(data_path=str(file), output_dir=tmp_path / "m"))
    file = as_json(tmp_path / "rows.json", [{"instruction": "a", "input": 3, "output": "x"}])
    with pytest.raises(ValueError, match="row 0: input is 3, expected text"):
        train(settings(place, tmp_path, data_path=str(file)))
    file = as_json(tmp_path / "rows.json", [{"question": "x"}])
    with pytest.raises(ValueError, match=r"no column 'instruction' .found question.; no column"):
        train(settings(place, tmp_path, data_path=str(file)))


def test_a_folder_of_other_things_is_not_written_over(place, tmp_path):
    (tmp_path / "mola").mkdir()
    (tmp_path / "mola/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"mola holds thesis.txt, which is no part of a mixture"):
        train(settings(place, tmp_path))
    assert (tmp_path / "mola/thesis.txt").read_text() == "years of work"
    for name in (".", "", "/", "a/.."):
        with pytest.raises(ValueError, match=r"output_dir is .*, expected a folder of its own"):
            TrainConfig(output_dir=Path(name))


def test_an_encoder_decoder_is_told_by_its_kind(tmp_path, place):
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"a t5 or .*, expected AutoModelForCausalLM"):
        train(settings(place, tmp_path, base_model=str(tmp_path / "t5")))


@pytest.mark.parametrize(
    ("typed_in", "told"),
    [
        (["train", "--number_expert", "2"], "unrecognized arguments: --number_expert 2"),
        (["evaluate", "--mola_weight", "x"], "unrecognized arguments: --mola_weight x"),
        (["prepare", "--prompt_format", "CQ-A"], "input is 'CQ', expected one of CQM"),
        (["train", "--lora_r", "8,8,"], "lora_r is '8,8,', expected"),
        (["train", "--obalance", "often"], 'Parser key "obalance"'),
        (["ask", "--question", "Why?"], "choices are 0, expected 2 to 26"),
        (["sing"], "invalid choice: 'sing'"),
        ([], 'expected "subcommand" to be one of {prepare,train,evaluate,ask'),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, capsys, typed_in, told):
    with pytest.raises(SystemExit) as ended:
        typed(tmp_path, *typed_in)
    assert ended.value.code == 2
    last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and told in last


@pytest.mark.parametrize("name", ["train", "evaluate", "ask", "prepare", "prepare_instruction"])
def test_help_tells_every_flag(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as ended:
        typed(tmp_path, name, "--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    flags = [line.split()[0] for line in said.splitlines() if line.startswith("  --")]
    assert len(flags) > 5 and f"usage: nlp.scienceqa [options] {name}" in said
