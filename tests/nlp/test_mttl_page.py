"""MTTL's commands beside ours: each of ours is run as the page has it, on tiny models."""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import datasets
import pytest

from apps.mole import main as mole
from mole_vl.library import ExpertLibrary
from nlp.data import write_rows
from nlp.prepare_tasks import PrepareTasksConfig, main as prepare_tasks
from nlp.private_config import PrivateLibraryConfig
from nlp.private_library import main as private_library
from tests.nlp.library_toys import rows_of, typed
from tests.nlp.test_evaluate import SAY
from tests.nlp.toys import tiny_folder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/mttl.md").read_text()
HERE = [re.findall(r"`([^`]+)`", line.split("|")[2])[0] for line in PAGE.splitlines()
        if line.startswith("| `")]  # fmt: skip
TASKS = ["ai2_arc/ARC-Easy:1.0.0", "wnli", *(f"task{n}" for n in range(10))]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """What the Hub has, in folders that are called as it is there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for base in ("microsoft/phi-2", "EleutherAI/gpt-neo-125m"):
        tiny_folder(tmp_path / base)
    (tmp_path / "chiayewken/flan-v2").mkdir(parents=True)
    with (tmp_path / "chiayewken/flan-v2/train.csv").open("w", newline="") as file:
        rows = [(f"{task[:5]} {n}?", task[-3:], task) for task in TASKS for n in range(2)]
        csv.writer(file).writerows([["source", "target", "task_name"], *rows])
    write_rows(tmp_path / "rows.jsonl", rows_of("past"))
    (tmp_path / "say.yaml").write_text(SAY.format(folder=tmp_path))
    return tmp_path


def test_the_commands_run_one_after_the_other(place, monkeypatch, capsys):
    few = "--fit.steps 1 --fit.warmup 0 --fit.rows 1 --fit.progress false"
    ran = []
    for shown in HERE:
        words = shlex.split(shown.replace("--tasks arc_easy", "--tasks say.yaml"))
        if words[0] not in ("python", "mole"):
            continue
        program = "mole" if words[0] == "mole" else words[2]
        arguments = words[1:] if program == "mole" else words[3:]
        if program == "mole":
            monkeypatch.setattr(sys, "argv", ["mole", *arguments])
            mole()
        elif program == "nlp.private_library":
            typed(monkeypatch, PrivateLibraryConfig, private_library, *arguments, *few.split())
        else:
            assert program == "nlp.prepare_tasks"
            typed(monkeypatch, PrepareTasksConfig, prepare_tasks, *arguments)
        ran.append(program)
    assert ran.count("nlp.private_library") == 4 and ran.count("mole") == 4
    assert "10 of 10 experts are in local://modular_artifacts/mbc" in capsys.readouterr().out
    assert list(ExpertLibrary.open("modular_artifacts/library")) == ["arc_easy"]
    assert len(ExpertLibrary.open("modular_artifacts/private")) == len(TASKS)
    assert len(ExpertLibrary.open("modular_artifacts/fast")) == 2
    clusters = ExpertLibrary.open("modular_artifacts/mbc")
    tasks = [task for name in clusters for task in str(clusters[name].info.task).split(",")]
    assert sorted(tasks) == sorted(ExpertLibrary.open("modular_artifacts/private"))
    assert clusters.auxiliary.kinds(next(iter(clusters))) == ["prototypes"]
    for route in ("uniform", "arrow"):
        found = json.loads((place / f"an_expert_eval/{route}.json").read_text())
        assert found["measured"]["route"] == route and found["lm_eval"]["results"]["say"]


def test_the_calls_that_open_libraries_run(place):
    ExpertLibrary.open("virtual://USER/REPO", create=True)
    calls = [shown for shown in HERE if shown.startswith("ExpertLibrary.open(")]
    assert len(calls) == 5
    for call in calls:
        # The Hub and Azure themselves are the library's own tests'.
        shown = re.sub(r'"(hf|az)://[^"]+"', '"virtual://USER/REPO"', call)
        library = eval(shown, {"ExpertLibrary": ExpertLibrary, "token": None})
        assert isinstance(library, ExpertLibrary)
    assert (place / "my_local_library/library.json").exists()


def test_the_sample_runs(capsys):
    (sample,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope = {}
    exec(compile(sample, "docs/mttl.md", "exec"), scope)
    assert "example_task Expert(" in capsys.readouterr().out
    assert list(scope["library"]) == []
