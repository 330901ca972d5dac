"""A dataset as a library of tasks: which rows, how they are called, at any address."""

import csv
from pathlib import Path

import datasets
import pytest

from mole_vl.library import ExpertLibrary
from nlp.data import TextRow, read_rows
from nlp.prepare_tasks import Prepared, PrepareTasksConfig, drawn, main
from nlp.task_library import TaskLibrary
from nlp.task_sources import open_tasks
from tests.nlp.library_toys import typed

CONFIG = Path(__file__).parents[2] / "configs/flan_tasks.yaml"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def table(rows, name="flan.csv"):
    with Path(name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["source", "target", "task_name"], *rows])
    return name


def flan(count=6):
    rows = [(f"Q{n}?", f"a{n}", "arc/ARC-Easy:1.0.0") for n in range(count)]
    return table([*rows, ("one?", "two", "wnli")])


def config(dataset, **changes):
    given = {"prompt": "{source}", "answer": "{target}", "task": "{task_name}"}
    given |= {"library": "local://tasks", "underscores": True}
    return PrepareTasksConfig(dataset=dataset, **given | changes)


@pytest.mark.parametrize("address", ["local://tasks", "tasks", "virtual://prepared"])
def test_each_task_is_a_file_at_any_address(address):
    main(config(flan(), library=address))
    library = TaskLibrary.open(address)
    assert library.tasks() == ["arc_ARC_Easy_1_0_0", "wnli"]
    assert library.rows("wnli") == [TextRow("one?", "two", "wnli")]
    assert [row.answer for row in library.rows("arc_ARC_Easy_1_0_0")] == [
        f"a{n}" for n in range(6)
    ]  # fmt: skip


def test_on_disk_they_are_plain_json_lines():
    main(config(flan()))
    assert read_rows(Path("tasks/tasks/wnli.jsonl")) == [TextRow("one?", "two", "wnli")]


def test_more_rows_than_are_wanted_are_drawn_and_the_rest_is_told(capsys):
    first, second = main(config(flan(50), max_rows=5))
    assert first == Prepared("arc_ARC_Easy_1_0_0", 5, 45, True)
    assert second == Prepared("wnli", 1, 0, True)
    told = capsys.readouterr().out
    assert "arc_ARC_Easy_1_0_0: 5 rows, 45 left out (more than 5)" in told
    assert "2 tasks with 6 rows are in" in told and "45 rows left out" in told


def test_a_draw_is_the_tasks_own_and_the_seeds():
    places = list(range(100, 200))
    found = drawn("past", places, 10, 0)
    assert found == sorted(set(found)) and set(found) < set(places) and len(found) == 10
    assert drawn("past", places, 10, 0) == found
    assert drawn("past", places, 10, 1) != found != drawn("plural", places, 10, 0)
    assert drawn("past", places, 100, 0) == places


def test_a_second_call_writes_what_is_missing(capsys):
    main(config(flan(20), max_rows=3, tasks="wnli"))
    before = Path("tasks/tasks/wnli.jsonl").stat().st_mtime_ns
    again = main(config("flan.csv", max_rows=3))
    assert [one.new for one in again] == [True, False]
    assert Path("tasks/tasks/wnli.jsonl").stat().st_mtime_ns == before
    assert "wnli: is there, 1 rows" in capsys.readouterr().out


def test_rows_that_are_there_are_never_changed():
    main(config(flan(20), max_rows=3))
    before = Path("tasks/tasks/arc_ARC_Easy_1_0_0.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"other rows under tasks/arc_ARC_Easy_1_0_0\.jsonl"):
        main(config("flan.csv", max_rows=4))
    assert Path("tasks/tasks/arc_ARC_Easy_1_0_0.jsonl").read_bytes() == before


def test_the_shipped_config_fits_flans_columns(monkeypatch):
    flan()
    typed(monkeypatch, PrepareTasksConfig, main, "--config", CONFIG, "--dataset", "flan.csv",
          "--max-rows", 2)  # fmt: skip
    assert len(TaskLibrary.open("local://modular_artifacts/flan-flat").tasks()) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "{kind}"}, "no column 'kind'"),
        ({"dataset": "nowhere.csv"}, "no such file"),
        ({"underscores": False}, r"task is 'arc/ARC-Easy:1.0.0'.*underscores true"),
        ({"underscores": False, "task": "../{task_name}"}, r"task is '\.\./arc"),
        ({"tasks": "wnli,bob"}, "there is no task 'bob'; there are arc_ARC_Easy_1_0_0, wnli"),
        ({"library": "hf://bob"}, "expected hf://USER/REPO"),
        ({"dataset": "twins.csv"}, "'a-b' and 'a:b'|a-b and a:b are both called 'a_b'"),
        ({"dataset": "empty.csv"}, "no rows"),
        ({"dataset": "blank.csv"}, "row 0: 'answer' is ''"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_is_written(changes, message):
    table([("q", "a", "a-b"), ("q", "a", "a:b")], "twins.csv")
    table([], "empty.csv")
    table([("q", "", "past")], "blank.csv")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(config(**{"dataset": flan()} | changes))
    assert not Path("tasks/tasks").exists()


def test_a_configs_faults_are_told_at_once():
    with pytest.raises(ValueError, match=r"library is empty.*max_rows is 0.*seed is -1"):
        config("x.csv", library="", max_rows=0, seed=-1)


def test_what_is_no_library_of_tasks_is_told():
    ExpertLibrary.open("experts", create=True)
    with pytest.raises(FileNotFoundError, match=r"no library of tasks here \(tasks.json"):
        TaskLibrary.open("experts")
    with pytest.raises(ValueError, match="experts: a library of experts is here"):
        TaskLibrary.open("experts", create=True)
    assert sorted(path.name for path in Path("experts").iterdir()) == ["library.json"]
    Path("rows.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"data: rows.jsonl is a file, .*{TASK: rows.jsonl}"):
        open_tasks("data", "rows.jsonl")
    library = TaskLibrary.open("virtual://few", create=True)
    with pytest.raises(ValueError, match="has no task 'past'; it has none"):
        library.rows("past")
    with pytest.raises(ValueError, match=r"task is '\.\./a'.*no rows of 'b'"):
        library.add({"../a": [TextRow("p", "a", "t")], "b": []})
