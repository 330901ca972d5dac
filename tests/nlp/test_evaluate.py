"""The program evaluate on tiny models and local tasks, the whole way."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from jsonargparse import auto_cli
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from mole_vl import mix, read_peft, save_gates, write_peft
from mole_vl.gates import Arrow, Average, Constants, MoLE, Sum
from mole_vl.specs import to_data
from nlp import evaluate, harness_run
from nlp.adapter import blocks, bound
from nlp.data import EncodedRow, TextRow, collate, encode_rows, write_rows
from nlp.evaluate import EvaluateConfig, main
from nlp.harness import HarnessModel
from nlp.harness_tasks import load_tasks
from nlp.models import load_base
from nlp.task import answer_losses
from tests.nlp.families import experts_on, lively
from tests.nlp.test_answers import said_alone
from tests.nlp.toys import ROWS, quantisable_folder, tiny_model, tiny_tokenizer
from tests.toys import randomise

NAMES = ("past", "plural", "french")
CHOICES = ["cats", "went", "sept", "oxen"]
PICK = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: [cats, went, sept, oxen]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: brier_score, aggregation: brier_score}}
"""
SAY = """
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
filter_list:
  - {{name: stripped, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, ignore_case: true}}
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def world(tmp_path):
    """A base, three experts, and two tasks."""
    model = lively(tiny_model(layers=3))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for one in experts_on(model, blocks(model), NAMES):
        write_peft(one, tmp_path / one.name)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/pick.yaml").write_text(PICK.format(folder=tmp_path))
    (tmp_path / "tasks/say.yaml").write_text(SAY.format(folder=tmp_path))
    return tmp_path


def config(world, **settings):
    settings = {"experts": tuple(world / name for name in NAMES), **settings}
    return EvaluateConfig(
        tasks=(f"{world}/tasks/",), output=world / "out/results.json", base=str(world / "base"),
        **settings,
    )  # fmt: skip


def results(config):
    main(config)
    return json.loads(config.output.read_text())


def by_hand(model, around):
    """Brier score and accuracy of the choices, each row by itself."""
    tokenizer = tiny_tokenizer()
    scores, hits = [], []
    for one in ROWS:
        prompt = tuple(tokenizer(one.prompt)["input_ids"])
        chances = []
        for choice in CHOICES:
            ids = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            batch = collate([EncodedRow(prompt, tuple(ids), TextRow("", "", ""))], 0)
            with torch.no_grad(), around(batch):
                chances.append(-answer_losses(model, batch)[0].sum())
        found = torch.stack(chances).double()
        wanted = CHOICES.index(one.answer)
        truth = torch.eye(len(CHOICES))[wanted]
        scores.append((found.softmax(-1) - truth).square().sum().item())
        hits.append(int(found.argmax()) == wanted)
    return sum(scores) / len(scores), sum(hits) / len(hits)


ARMS = {
    "uniform": ({}, {"gate": Average(), "site": "block"}),
    "arrow": ({"gate": Arrow(top_k=2), "site": "matrix"},) * 2,
    "sum": ({"gate": Sum(), "site": "network"},) * 2,
    "one": ({"gate": Constants(weights={"past": 0.0, "plural": 1.0, "french": 0.0})},) * 2,
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_mixture_scores_as_it_does_by_hand(world, arm, capsys):
    given, placed = ARMS[arm]
    found = results(config(world, **given, batch_rows=3))
    model, _ = load_base(str(world / "base"))
    experts = [read_peft(world / name) for name in NAMES]
    mixture = mix(model, experts, **placed, blocks=blocks(model))
    brier, accuracy = by_hand(model, bound(mixture))
    assert found["results"]["pick"]["brier_score,none"] == pytest.approx(brier, rel=1e-4)
    assert found["results"]["pick"]["acc,none"] == accuracy
    assert found["measured"]["experts"] == dict(zip(mixture.names, mixture.digests, strict=True))
    assert found["measured"]["site"] == mixture.layout.kind
    assert "brier_score" in capsys.readouterr().out


def test_trained_gates_and_the_base_alone(world):
    model, _ = load_base(str(world / "base"))
    base, _ = by_hand(model, lambda _batch: torch.no_grad())
    alone = results(config(world, experts=()))
    assert alone["results"]["pick"]["brier_score,none"] == pytest.approx(base, rel=1e-4)
    assert alone["measured"].keys() == {"base", "quantise", "style"}

    experts = [read_peft(world / name) for name in NAMES]
    mixture = mix(
        model, experts, gate=MoLE(over="row"), site="preview", after=1, blocks=blocks(model)
    )
    randomise(mixture, size=1.0)
    save_gates(mixture, world / "gates.safetensors")
    brier, _ = by_hand(model, bound(mixture))
    found = results(config(world, gates=world / "gates.safetensors"))
    assert found["results"]["pick"]["brier_score,none"] == pytest.approx(brier, rel=1e-4)
    assert found["measured"]["gate"]["kind"] == "MoLE"
    assert abs(brier - base) > 1e-3


def test_answers_are_matched_and_the_limit_is_kept(world):
    model, tokenizer = load_base(str(world / "base"))
    said = said_alone(model, tokenizer, encode_rows(ROWS, tokenizer)[0], 6)
    right = TextRow(ROWS[0].prompt, said.upper(), "plural")
    write_rows(world / "rows.jsonl", [right, *ROWS[1:]])
    (world / "tasks/pick.yaml").unlink()
    found = results(config(world, experts=()))
    assert found["results"]["say"]["exact_match,stripped"] == 0.25
    found = results(config(world, experts=(), limit=2, num_fewshot=0))
    assert found["results"]["say"]["exact_match,stripped"] == 0.5


def test_worked_examples_and_the_chat_template_are_shown(world, monkeypatch):
    seen = []
    yaml = (world / "tasks/pick.yaml").read_text()
    (world / "tasks/pick.yaml").write_text(yaml + "fewshot_split: test\n")
    (world / "tasks/say.yaml").unlink()
    told = HarnessModel._encode_pair

    def spied(self, context, continuation):
        seen.append(context)
        return told(self, context, continuation)

    monkeypatch.setattr("nlp.harness.HarnessModel._encode_pair", spied)
    results(config(world, experts=(), num_fewshot=1, style="chat"))
    assert all(text.startswith("<user>") and text.endswith("<answer>") for text in seen)
    assert all(text.count("<user>") == 2 for text in seen)


FAULTS = {
    "tasks is empty": {"tasks": ()},
    "limit is 0, expected at least 1": {"limit": 0},
    "num_fewshot is -1": {"num_fewshot": -1},
    "batch_rows is 0": {"batch_rows": 0},
    "gate is given, and gates, whose file says its own": {"gate": Sum(), "gates": "g.safetensors"},
    "site is given, and no experts": {"experts": (), "site": "block"},
    "gates is given, and no experts": {"experts": (), "gates": "g.safetensors"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_settings_that_cannot_be_are_refused(world, fault):
    with pytest.raises(ValueError, match=fault):
        EvaluateConfig(**{"tasks": ("x",), "output": world, "experts": (world,), **FAULTS[fault]})


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError, match=r"tasks is empty; .*limit is 0.*; batch_rows is 0"):
        EvaluateConfig(tasks=(), output="x", limit=0, batch_rows=0)


def test_faults_come_in_a_sentence_and_leave_nothing(world, monkeypatch):
    given = config(world)
    (world / "blocked").write_text("a file")

    def refused(kind, match, **changes):
        with pytest.raises(kind, match=match):
            main(EvaluateConfig(**{**vars(given), **changes}))

    refused(ValueError, "output: .*blocked is a file", output=world / "blocked/results.json")
    refused(ValueError, "output: .* is a folder, expected a file", output=world)
    refused(FileNotFoundError, "gates: .*missing", gates=world / "missing.safetensors")
    refused(FileNotFoundError, "nothing", experts=(world / "nothing",))
    model, _ = load_base(str(world / "base"))
    other = mix(model, [read_peft(world / "past")], gate=Sum(), site="matrix")
    save_gates(other, world / "gates.safetensors")
    refused(ValueError, "past", gates=world / "gates.safetensors", experts=(world / "french",))
    two = SimpleNamespace(num_processes=2, device="cpu")
    monkeypatch.setattr(evaluate, "PartialState", lambda: two)
    refused(ValueError, "runs in one process, and here are 2")
    monkeypatch.setattr(harness_run, "find_spec", lambda _name: None)
    refused(ValueError, r"needs the package lm-eval: pip install 'mole-vl\[evaluate\]'")
    assert not (world / "out").exists()


def test_the_preset_is_a_configuration_of_the_program_over_tasks_that_are_here():
    arguments = ["--config", "configs/text_evaluate.yaml"]
    given = auto_cli(EvaluateConfig, as_positional=False, args=arguments)
    assert all(folder.is_dir() for folder in given.experts)
    tasks = {task.task_name: task for task in load_tasks(given.tasks)}
    assert set(tasks) == {"text_continent", "text_isa", "text_plural"}
    for name, task in tasks.items():
        docs = [*task.eval_docs, *task.fewshot_docs()]
        assert len(task.eval_docs) == 25
        assert {doc["task"] for doc in docs} == {name.removeprefix("text_")}
        if task.OUTPUT_TYPE == "multiple_choice":
            assert {doc["answer"] for doc in docs} == set(task.doc_to_choice(docs[0]))


def commands():
    """The command lines of the page, as lists of arguments."""
    lines = Path("docs/evaluation.md").read_text().splitlines()
    start = "    python -m nlp.evaluate "
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


@pytest.mark.parametrize("arguments", commands(), ids=lambda given: given[-1])
def test_the_commands_of_the_page_run(world, arguments):
    given = auto_cli(EvaluateConfig, as_positional=False, args=arguments)
    # Tiny experts, as many as the page's, over a tiny base, and a task that is here.
    base = quantisable_folder(world / "wide") if given.quantise else world / "base"
    tiny = {"base": str(base), "tasks": (f"{world}/tasks/pick.yaml",)}
    experts = tuple(world / name for name in NAMES[: len(given.experts)])
    found = results(replace(given, **tiny, experts=experts, output=world / given.output))
    assert len(found["measured"].get("experts", ())) == len(experts)
    if given.gate is not None:
        assert found["measured"]["gate"] == to_data(Arrow(top_k=4))


class Canned(LM):
    """Says what it was told to."""

    def __init__(self, said):
        super().__init__()
        self.said, self.asked = said, []

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return self.said

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def test_scienceqa_is_asked_and_read_as_its_file_says(tmp_path, monkeypatch):
    row = {"instruction": "Context: Hint.\nQuestion: ...?\nOptions: (A) a (B) b", "input": None}
    letters = ["B", "A", "A", "B"]
    file = tmp_path / "scienceqa/scienceq_test.json"
    file.parent.mkdir()
    rows = [{**row, "output": f"Answer: The answer is {x}.", "answer": x} for x in letters]
    file.write_text(json.dumps(rows))
    task = Path("configs/scienceqa.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    answers = ["Answer: The answer is B.", "The answer is A. BECAUSE: B.", "A", "The answer is A."]
    model = Canned(answers)
    found = simple_evaluate(
        model=model, tasks=load_tasks([str(task)]),
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    assert found["results"]["scienceqa_text"]["exact_match,letter"] == 0.5
    prompt, how = model.asked[0]
    assert prompt.endswith(f"### Instruction:\n{row['instruction']}\n\n### Response:\n")
    assert how["until"] == ["\n"]
