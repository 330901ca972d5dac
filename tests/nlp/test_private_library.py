"""One expert a task from one file of settings: in sequence or at once, what fails or is missing."""

import json
from dataclasses import replace

import pytest
import torch

from mole_vl.faults import as_messages
from mole_vl.library import ExpertLibrary
from mole_vl.lora import LoRA
from mole_vl.training import Term
from nlp import private_library
from nlp.models import load_base
from nlp.private_config import PrivateLibraryConfig
from nlp.private_library import main
from nlp.task_library import TaskLibrary
from nlp.train_many import ManyTask
from tests.nlp.library_toys import private_config, rows_of, shelf, typed, world


@pytest.fixture
def place(tmp_path):
    return world(tmp_path, ("past", "plural", "french"))


def deltas(library, name):
    layers = library[name].expert.layers
    return {path: factors.delta() for path, factors in layers.items()}


def test_one_expert_a_task_with_what_is_known_of_it(place):
    config = shelf(place, licence="MIT")
    library = ExpertLibrary.open(config.library)
    assert sorted(library) == ["french", "past", "plural"]
    info = library["past"].info
    assert (info.task, info.base, info.licence) == ("past", config.base, "MIT")
    assert info.ranks == (2,) and info.training["fit"]["steps"] == 4
    assert info.training["lora"]["targets"] == ["q_proj", "v_proj"]
    assert all(delta.abs().max() > 0 for delta in deltas(library, "past").values())


def test_an_expert_of_several_tasks_learns_all_their_rows(place):
    config = shelf(place, experts={"words": "past, plural", "french": "french"})
    library = ExpertLibrary.open(config.library)
    assert sorted(library) == ["french", "words"]
    assert library["words"].info.task == "past,plural"
    assert library["words"].info.training["rows"] == 6


def test_together_and_in_sequence_end_with_the_same_weights(place):
    first = ExpertLibrary.open(shelf(place).library)
    other = ExpertLibrary.open(
        shelf(place, together=True, library=f"local://{place}/other").library
    )
    for name in first:
        for path, delta in deltas(first, name).items():
            torch.testing.assert_close(deltas(other, name)[path], delta, rtol=2e-2, atol=1e-4)


def test_a_second_call_trains_only_what_is_missing(place, capsys, monkeypatch):
    config = shelf(place, only=("past",))
    before = ExpertLibrary.open(config.library)["past"].info
    TaskLibrary.open(config.data).add({"german": rows_of("german")})
    taught = []
    real = private_library.taught
    monkeypatch.setattr(
        private_library, "taught", lambda *a, **k: taught.extend(a[1]) or real(*a, **k)
    )
    main(replace(config, only=()))
    assert taught == ["french", "german", "plural"]
    library = ExpertLibrary.open(config.library)
    assert len(library) == 4 and library["past"].info == before
    main(replace(config, only=(), fit=replace(config.fit, steps=9)))
    assert len(taught) == 3
    told = capsys.readouterr().out
    assert "past: is there, trained otherwise: fit was" in told
    assert "4 of 4 experts are in" in told


def test_rows_that_are_others_by_now_are_told(place, capsys):
    config = shelf(place, only=("past", "french"))
    main(config)
    assert capsys.readouterr().out.count(": is there\n") == 2
    file = place / "tasks/tasks/past.jsonl"
    file.write_text(file.read_text().replace("went", "gone"))
    (place / "tasks/tasks/french.jsonl").write_text("{}\n")
    main(config)
    told = capsys.readouterr().out
    assert "past: is there, trained otherwise: its rows were others\n" in told
    assert "french: is there, trained otherwise: its rows are not to be read now (" in told


def test_no_base_is_loaded_where_nothing_is_missing(place, monkeypatch):
    config = shelf(place, only=("past",))
    monkeypatch.setattr(private_library, "load_base", None)
    main(config)


@pytest.mark.parametrize("together", [False, True])
def test_a_failed_task_is_told_and_the_rest_go_on(place, capsys, together):
    (place / "tasks/tasks/plural.jsonl").write_text('{"prompt": "a"}\n')
    TaskLibrary.open(f"local://{place}/tasks").add(
        {"long": [replace(rows_of("past")[0], prompt="a" * 200, task="long")]}
    )
    config = private_config(place, together=together)
    with pytest.raises(SystemExit) as ended:
        main(config)
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert sorted(ExpertLibrary.open(config.library)) == ["french", "past"]
    assert "2 of 4 experts are in" in told.out
    assert "error: plural: " in told.err and "no 'answer'" in told.err
    assert "error: long: rows of long: longer than the 128 tokens" in told.err
    assert told.err.count("error:") == 2


def test_a_failed_training_leaves_the_base_as_it_was(place, capsys, monkeypatch):
    model, tokenizer = load_base(str(place / "base"))
    monkeypatch.setattr(private_library, "load_base", lambda *a, **k: (model, tokenizer))
    plain = {name: p.clone() for name, p in model.state_dict().items()}
    real = private_library.save_tenant

    def broken(mixture, name, *rest):
        if name == "past":
            raise RuntimeError("the disk is full")
        real(mixture, name, *rest)

    monkeypatch.setattr(private_library, "save_tenant", broken)
    config = private_config(place)
    with pytest.raises(SystemExit):
        main(config)
    assert "error: past: the disk is full" in capsys.readouterr().err
    assert sorted(ExpertLibrary.open(config.library)) == ["french", "plural"]
    assert not hasattr(model, "mixture") and plain.keys() == model.state_dict().keys()
    monkeypatch.setattr(private_library, "save_tenant", real)
    main(config)
    assert len(ExpertLibrary.open(config.library)) == 3


def test_of_those_trained_together_the_rest_go_on_where_one_fails(place, capsys, monkeypatch):
    real = ManyTask.losses

    def losses(self, batch):
        terms = real(self, batch)
        if "plural" in batch.owners:
            terms["plural/lm"] = Term(terms["plural/lm"].value * float("nan"))
        return terms

    monkeypatch.setattr(ManyTask, "losses", losses)
    config = private_config(place, together=True)
    with pytest.raises(SystemExit):
        main(config)
    told = capsys.readouterr()
    assert "in one pass: FAILED: fit: the term 'plural/lm' is nan" in told.out
    assert "french, past, plural are trained one after the other now" in told.out
    assert "error: plural: fit: the term 'plural/lm' is nan" in told.err
    assert told.err.count("error:") == 1
    assert sorted(ExpertLibrary.open(config.library)) == ["french", "past"]


def test_of_those_trained_together_one_that_cannot_be_kept_costs_no_other(
    place, capsys, monkeypatch
):
    real, passes = private_library.taught, []
    monkeypatch.setattr(
        private_library, "taught", lambda *a, **k: passes.append(list(a[1])) or real(*a, **k)
    )
    kept = private_library.save_tenant

    def broken(mixture, name, *rest):
        if name == "french":
            raise RuntimeError("the disk is full")
        kept(mixture, name, *rest)

    monkeypatch.setattr(private_library, "save_tenant", broken)
    config = private_config(place, together=True)
    with pytest.raises(SystemExit):
        main(config)
    assert "error: french: the disk is full" in capsys.readouterr().err
    assert sorted(ExpertLibrary.open(config.library)) == ["past", "plural"]
    assert passes == [["french", "past", "plural"]]


def test_a_damaged_expert_is_told_and_not_trained_over(place, capsys):
    config = shelf(place)
    folder = ExpertLibrary.open(config.library)["past"].path
    assert folder is not None
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit):
        main(config)
    assert "error: past: " in (err := capsys.readouterr().err) and "is damaged" in err


def test_rows_may_have_a_source_each(place, monkeypatch):
    TaskLibrary.open(f"local://{place}/tasks")
    (place / "rows.csv").write_text("word,many\nox,oxen\ncow,cows\n")
    settings = {
        "library": "local://library", "base": str(place / "base"),
        "data": {
            "plural": {"dataset": "rows.csv", "prompt": "{word}:", "answer": "{many}", "task": "t"},
            "past": str(place / "tasks/tasks/past.jsonl"),
        },
        "lora": {"form": {"rank": 1}, "targets": ["q_proj"]},
        "fit": {"output": "runs", "steps": 1, "rows": 1, "progress": False},
    }  # fmt: skip
    monkeypatch.chdir(place)
    (place / "library.yaml").write_text(json.dumps(settings))
    typed(monkeypatch, PrivateLibraryConfig, main, "--config", "library.yaml",
          "--together", "--experts", "{all: 'past,plural'}", "--lora.form.rank", "3")  # fmt: skip
    library = ExpertLibrary.open("library")
    assert library["all"].info.training["rows"] == 5 and library["all"].info.ranks == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": {"a/b": "past", "c": " , "}}, "expert is 'a/b'.*expert 'c' has no task"),
        ({"experts": {"words": "past,plural,past"}}, "expert 'words' has the task past twice"),
        ({"library": "tasks", "data": "tasks"}, "library and data are both 'tasks'"),
        ({"context": 1, "library": ""}, "library is empty.*context is 1"),
    ],
)
def test_a_configs_faults_are_told_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        private_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts": {"a": "pest", "b": "past,frensh"}},
            "no rows of the task 'frensh'; there are french, past, plural; there",
        ),
        ({"only": ("bob",)}, "only names 'bob'"),
        ({"data": "local://nowhere"}, "no library of tasks here"),
        ({"lora": LoRA(targets=("bob",))}, "bob"),
        ({"base": "nowhere"}, "there is no such folder"),
    ],
)
def test_what_cannot_be_is_one_message(place, capsys, changes, message):
    with pytest.raises(SystemExit) as ended, as_messages("nlp"):
        main(private_config(place, **changes))
    assert ended.value.code == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in told
