"""Tasks of lm-eval by name and from files; faults in a sentence."""

import json

import datasets
import pytest

from nlp import harness_tasks
from nlp.harness_tasks import load_tasks

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "one", "answer": "two"}) + "\n")
    place = tmp_path / "tasks"
    place.mkdir()
    for name in ("first", "second"):
        (place / f"{name}.yaml").write_text(YAML.format(name=name, folder=tmp_path))
    return place


@pytest.fixture
def known(monkeypatch, folder):
    """lm-eval as if it had two tasks of its own: to list its thirteen thousand takes long."""
    real = harness_tasks.TaskManager

    def manager(include_path=None, include_defaults=True):
        return real(
            include_path=folder if include_defaults else include_path, include_defaults=False
        )

    monkeypatch.setattr(harness_tasks, "TaskManager", manager)


def names(found):
    return [getattr(item, "task_name", None) or item.name for item in found]


def test_a_folder_stands_for_its_tasks_and_a_file_for_its_own(folder):
    (folder / "_shared.yaml").write_text("output_type: generate_until\n")
    assert names(load_tasks([f"{folder}/"])) == ["first", "second"]
    assert names(load_tasks([f"{folder}/second.yaml"])) == ["second"]
    task = load_tasks([f"{folder}/first.yaml"])[0]
    assert [task.doc_to_text(doc) for doc in task.eval_docs] == ["one"]


def test_a_group_holds_its_tasks(folder):
    (folder / "both.yaml").write_text("group: both\ntask: [first, second]\n")
    found = load_tasks([f"{folder}/"])
    assert names(found) == ["both"]
    assert {task.task_name for task in found[0].get_all_tasks()} == {"first", "second"}


def test_names_are_those_that_lm_eval_knows(folder, known):
    assert names(load_tasks(["second", "first"])) == ["second", "first"]
    with pytest.raises(ValueError, match="no task, group or tag 'frist'; did you mean first"):
        load_tasks(["frist", "second"])
    with pytest.raises(ValueError, match="a folder is written with a slash"):
        load_tasks(["qqqq"])


def test_a_task_is_asked_for_once(folder, known):
    with pytest.raises(ValueError, match=f"first is in first and in {folder}/"):
        load_tasks(["first", f"{folder}/"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("task: [", "ParserError: .* line 2, column 1"),
        ("nothing: 1\n", "Unknown config shape"),
        (YAML.replace("rows.jsonl", "none.jsonl"), "bad.yaml, was not loaded: .*none.jsonl"),
        (YAML.replace("test_split: test", "test_split: tset"), "tset"),
        (YAML + "doc_to_tetx: x\n", "doc_to_tetx"),
        (YAML + "process_docs: !function missing.rows\n", "missing"),
    ],
)
def test_a_yaml_that_is_no_task_is_told_by_its_file(folder, text, match):
    (folder / "bad.yaml").write_text(
        text.format(name="bad", folder=folder.parent) if "{" in text else text
    )
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        load_tasks([f"{folder}/"])
    assert "bad.yaml" in str(caught.value)


def test_places_without_tasks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder and no YAML file .*nowhere"):
        load_tasks([f"{tmp_path}/nowhere"])
    with pytest.raises(FileNotFoundError, match="holds no YAML of a task"):
        load_tasks([f"{tmp_path}/"])
