"""The program train_gates.py on a tiny language model, the whole way."""

import json
import runpy
import sys
from pathlib import Path

import jsonargparse
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from apps.search_gates import search_gates
from mole_vl import Expert, Factors, mix_from, read_gates, read_peft, write_peft
from mole_vl.gates import Arrow, Hidden, LoRAHub, MoLE, Sigmoid, Sum
from mole_vl.training import FitConfig
from mole_vl.training.search import SearchConfig
from nlp.adapter import blocks
from nlp.answers import log_likelihood
from nlp.data import TextRow, write_rows
from nlp.dataset import DatasetRows, rows_of
from nlp.mixed_text import MixedText, first_of_each, table
from nlp.models import load_base
from tests.nlp.toys import tiny_folder
from train_gates import train_gates

# The tiny model says the first letter of each vocabulary entry: enough to be right or wrong.
WORDS = ("abc", "bcd")
ROWS = [TextRow(f"{word}:", word[0], task) for word in WORDS for task in ("past", "plural")]


@pytest.fixture
def domain(tmp_path):
    base = str(tiny_folder(tmp_path / "base"))
    model, _ = load_base(base)
    for seed, name in enumerate(("past", "plural")):
        torch.manual_seed(seed)
        layers = {
            path: Factors(torch.randn(2, m.in_features), torch.randn(m.out_features, 2), 1.0)
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear) and path.endswith(("q_proj", "v_proj"))
        }
        write_peft(Expert(name, layers), tmp_path / name)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return MixedText(
        experts=[tmp_path / "past", tmp_path / "plural"],
        train=tmp_path / "rows.jsonl",
        test=tmp_path / "rows.jsonl",
        base=base,
    )


def config(tmp_path, **changes):
    settings = {"output": tmp_path / "run", "steps": 3, "rows": 4, "lr": 0.1, "progress": False}
    return FitConfig(**{**settings, **changes})


def test_from_a_config_to_gates_and_a_report(tmp_path, domain, capsys):
    train_gates(domain, config(tmp_path), gate=MoLE(normaliser=Sigmoid()), balance=0.01)
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    said = {name for name in log[-1] if name.startswith("gates/model/")}
    assert log[-1].keys() - said == {"step", "lr", "lm", "balance"}
    assert {name.rsplit("/", 1)[1] for name in said} == {"past", "plural"}
    assert (tmp_path / "run/gates/model.svg").exists()
    report = (tmp_path / "run/report.md").read_text()
    assert report in capsys.readouterr().out + "\n"
    assert report.splitlines()[0] == "| exact match | base | sum | NLA | gates | oracle |"
    hits = json.loads((tmp_path / "run/hits.json").read_text())
    assert hits.pop("task") == [row.task for row in ROWS]
    # What was saved is what was judged: mixed anew from the file, the gates give the same hits.
    model, _ = load_base(domain.base)
    file = tmp_path / "run/gates/model.safetensors"
    experts = [read_peft(folder) for folder in domain.experts]
    domain.mixture = mix_from(model, experts[::-1], file, blocks=blocks(model))
    domain.model = model
    assert domain.hits(["gates"])["gates"] == hits["gates"]
    assert read_gates(file).spec == MoLE(normaliser=Sigmoid())


def test_a_gate_may_learn_from_each_expert_alone(tmp_path, domain):
    gate = MoLE(score=Hidden(pool=("mean", "max", "last")), top_k=1, preview="average")
    how = {"gate": gate, "site": "preview", "after": 1, "alone": True, "report": False}
    train_gates(domain, config(tmp_path, save_every=1), **how)
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"choice", "gates/model/network/past"} <= log[-1].keys()
    survey = load_file(tmp_path / "run/survey.safetensors")["told"]
    for place, name in enumerate(("past", "plural")):
        with domain.mixture.pinned({name: 1.0}):
            told = log_likelihood(domain.model, domain.tokenizer, domain.train_rows)
        assert survey[:, place].tolist() == pytest.approx(told, abs=1e-4)
    trained = load_file(tmp_path / "run/gates/model.safetensors")
    train_gates(domain, config(tmp_path, save_every=1), **how)
    again = load_file(tmp_path / "run/gates/model.safetensors")
    assert all(torch.equal(again[key], trained[key]) for key in trained)
    with pytest.raises(ValueError, match="teaches nothing; take top_k 2, or alone: true"):
        train_gates(domain, config(tmp_path, output=tmp_path / "b"), **how | {"alone": False})
    train_gates(domain, config(tmp_path, output=tmp_path / "mixed"), report=False)
    with pytest.raises(ValueError, match="holds gates that were not taught by experts alone"):
        train_gates(domain, config(tmp_path, output=tmp_path / "mixed"), **how)
    with pytest.raises(ValueError, match="balance is a term of the mixture's loss"):
        train_gates(domain, config(tmp_path, output=tmp_path / "b"), **how, balance=0.1)
    model, _ = load_base(domain.base)
    experts = [read_peft(folder) for folder in domain.experts]
    file = tmp_path / "run/gates/model.safetensors"
    loaded = mix_from(model, experts, file, blocks=blocks(model))
    assert loaded.spec == gate


def test_one_expert_that_shares_with_nobody_is_refused(tmp_path, domain):
    domain.experts = domain.experts[:1]
    write_rows(tmp_path / "rows.jsonl", [row for row in ROWS if row.task == "past"])
    for gate, alone in ((MoLE(), False), (MoLE(normaliser=Sigmoid()), True)):
        with pytest.raises(ValueError, match="there is one expert, whose share is 1"):
            train_gates(domain, config(tmp_path), gate=gate, alone=alone)
    assert not (tmp_path / "run").exists()
    train_gates(domain, config(tmp_path), gate=MoLE(normaliser=Sigmoid()), report=False)
    after = domain.mixture.gates.state_dict()
    assert any(value.abs().max() > 0 for key, value in after.items() if "score" in key)


def test_gates_that_learn_nothing_are_judged_as_they_stand(tmp_path, domain, capsys):
    folder = tmp_path / "run"
    train_gates(domain, config(tmp_path), gate=Arrow(top_k=1), site="matrix")
    assert "Arrow gates have nothing to train; gates in" in capsys.readouterr().out
    hits = json.loads((folder / "hits.json").read_text())
    model, _ = load_base(domain.base)
    experts = [read_peft(path) for path in domain.experts]
    domain.mixture = mix_from(model, experts, folder / "gates/model.safetensors")
    domain.model = model
    assert domain.hits(["gates"])["gates"] == hits["gates"]
    # A folder of trained gates is not written over.
    train_gates(domain, config(tmp_path, output=tmp_path / "trained"), report=False)
    kept = (tmp_path / "trained/gates/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds gates that were trained, and Arrow gates have"):
        train_gates(domain, config(tmp_path, output=tmp_path / "trained"), Arrow(), site="matrix")
    assert (tmp_path / "trained/gates/model.safetensors").read_bytes() == kept


def test_what_is_general_is_taken_from_the_experts(domain):
    domain.general = domain.experts
    mixture = domain.mix(Sum(), "block")["model"]
    past, plural = (read_peft(folder) for folder in domain.experts)
    for path, factors in past.layers.items():
        half = (factors.delta() - plural.layers[path].delta()) / 2
        for weights, delta in (([1.0, 0.0], half), ([0.0, 1.0], -half), ([1.0, 1.0], 0 * half)):
            found = mixture.layers[path].delta(torch.tensor(weights))
            torch.testing.assert_close(found, delta, atol=1e-5, rtol=1e-4)


def test_weights_are_searched_by_a_program(tmp_path, domain, capsys):
    settings = SearchConfig(output=tmp_path / "run", evaluations=6, rows=4, progress=False)
    search_gates(domain, settings)
    assert "6 trials, loss" in capsys.readouterr().out
    report = (tmp_path / "run/report.md").read_text()
    assert report.splitlines()[0] == "| exact match | base | sum | NLA | gates | oracle |"
    trials = json.loads((tmp_path / "run/evaluations.json").read_text())["trials"]
    best = min(trials, key=lambda t: t["loss"] + 0.05 * sum(map(abs, t["weights"])) / 2)
    found = read_gates(tmp_path / "run/gates/model.safetensors")
    assert (found.spec, found.site, found.names) == (LoRAHub(), "network", ("past", "plural"))
    (values,) = found.tensors.values()
    assert values.tolist() == pytest.approx(best["weights"])


def test_arms_are_what_they_say(domain):
    mixture = domain.mix(MoLE(), "block")["model"]
    hits = domain.hits()
    with mixture.disabled():
        assert domain.hits(["gates"])["gates"] == hits["base"]
    with mixture.pinned([1.0, 1.0]):
        assert domain.hits(["gates"])["gates"] == hits["sum"]
    rows = domain.test_rows
    for name in ("past", "plural"):
        with mixture.pinned({name: 1.0}):
            alone = domain.hits(["gates"])["gates"]
        for row, mine, oracle in zip(rows, alone, hits["oracle"], strict=True):
            assert row.row.task != name or mine == oracle


def test_the_table_counts_by_task():
    lines = table(["a", "b", "a"], {"x": [True, False, False]}).splitlines()
    assert lines[2:] == ["| a | 0.500 |", "| b | 0.000 |", "| **all** | 0.333 |"]


def test_a_task_without_an_expert_is_named_before_anything_is_trained(tmp_path, domain):
    write_rows(domain.test, [*ROWS, TextRow("x:", "y", "german")])
    with pytest.raises(ValueError, match=r"a row's task is 'german', .* name \(past, plural\): "):
        train_gates(domain, config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_the_preset_of_few_examples_reads_as_it_is_shipped(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(train_gates)
    preset = parser.instantiate(parser.parse_path("configs/text_fewshot.yaml"))
    train, test = (rows_of("rows", source) for source in (preset.domain.train, preset.domain.test))
    assert len(train) == 16
    assert train[0].prompt == "The verb realize after he or she:"
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    assert isinstance(preset.gate, MoLE)


def test_few_examples_of_a_new_task_are_judged_beside_each_expert(tmp_path, domain, capsys):
    table = tmp_path / "few.csv"
    table.write_text("word,letter\n" + "".join(f"{word},{word[0]}\n" for word in WORDS))
    few = DatasetRows(dataset=str(table), prompt="{word}:", answer="{letter}", task="first letter")
    new = MixedText(domain.experts, few, few, base=domain.base)
    train_gates(new, config(tmp_path))
    lines = (tmp_path / "run/report.md").read_text().splitlines()
    assert lines[0] == "| exact match | base | sum | NLA | gates | past | plural |"
    assert lines[2].startswith("| first letter | ")
    assert "\n".join(lines) in capsys.readouterr().out
    hits = new.hits()
    for name in domain.experts:
        with new.mixture.pinned({name.name: 1.0}):
            assert hits[name.name] == new.hits(["gates"])["gates"]
    # The same rows from elsewhere go on with the run; other rows do not.
    rows = [TextRow(f"{word}:", word[0], "first letter") for word in WORDS]
    write_rows(domain.train, rows)
    again = MixedText(domain.experts, domain.train, domain.train, base=domain.base)
    train_gates(again, config(tmp_path), report=False)
    table.write_text("word,letter\nabc,a\n")
    with pytest.raises(ValueError, match="train was"):
        train_gates(MixedText(domain.experts, few, few, base=domain.base), config(tmp_path))


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_missing_file_of_rows_is_named_by_its_setting(domain, name):
    setattr(domain, name, domain.train.parent / "none.jsonl")
    with pytest.raises(
        FileNotFoundError, match=rf"^{name}: .*none.jsonl is no file, expected JSON"
    ):
        domain.mix(MoLE(), "block")


def test_a_report_may_ask_the_first_rows_of_each_task(domain):
    assert first_of_each(ROWS, 1) == [ROWS[0], ROWS[1]]
    assert first_of_each(ROWS, None) == ROWS
    domain.asked = 1
    domain.mix(MoLE(), "block")
    assert {arm: len(hits) for arm, hits in domain.hits().items()} == dict.fromkeys(
        ["base", "sum", "NLA", "gates", "oracle"], 2
    )
    with pytest.raises(ValueError, match=r"context is 1, .*; batch_rows is 0, .*; asked is -1, "):
        MixedText([], domain.train, domain.test, context=1, batch_rows=0, asked=-1)


def test_a_run_is_not_resumed_with_other_rows(tmp_path, domain):
    train_gates(domain, config(tmp_path, steps=2, schedule="constant"), report=False)
    write_rows(domain.train, ROWS[::-1])
    with pytest.raises(ValueError, match="train was"):
        train_gates(domain, config(tmp_path, schedule="constant"), report=False)


def test_a_mistake_on_the_command_line_is_one_message(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    for more, message in [
        (["--domain.asked", "0"], "error: MixedText: asked is 0, expected at least 1"),
        ([], f"error: train: {rows} is no file, expected JSON lines of prompt, answer and task"),
    ]:
        arguments = [
            *("--domain", "nlp.mixed_text.MixedText", "--domain.experts", "[]"),
            *("--domain.train", str(rows), "--domain.test", str(rows), *more),
            *("--fit.output", str(tmp_path / "run"), "--fit.steps", "1"),
        ]
        monkeypatch.setattr(sys, "argv", ["train_gates.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(Path(__file__).parents[2] / "train_gates.py"), run_name="__main__")
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"{message}\n"


def test_a_row_that_is_too_long_is_named_with_its_file(tmp_path, domain):
    write_rows(tmp_path / "long.jsonl", [*ROWS, TextRow("a" * 130, "b", "past")])
    domain.test = tmp_path / "long.jsonl"
    with pytest.raises(
        ValueError,
        match=r"^test: .*long.jsonl: longer than the 128 tokens that the base reads: row 4 ",
    ):
        train_gates(domain, config(tmp_path))
    domain.context = 100
    with pytest.raises(ValueError, match=r"^test: .*long.jsonl: longer than the context of 100 "):
        train_gates(domain, config(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["balance", "centring"])
def test_a_factor_below_zero_is_refused(tmp_path, domain, name):
    with pytest.raises(ValueError, match=f"{name} is -1, expected at least 0"):
        train_gates(domain, config(tmp_path), **{name: -1})


def test_experts_that_share_a_name_are_told_before_their_tasks(domain):
    domain.experts = [domain.experts[0]] * 2
    with pytest.raises(ValueError, match="experts share the names past"):
        domain.mix(MoLE(), "block")
