"""`mole library`, as it is typed."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from apps.mole import main
from mole_vl import Expert, Factors, read_peft, write_peft
from mole_vl.clusters import Clusters
from mole_vl.library import ExpertLibrary
from mole_vl.library.disk import Disk

ROOT = Path(__file__).parents[2]


def one(name, seed=0, rank=2, width=6):
    chance = torch.Generator().manual_seed(seed)
    layers = {
        f"layers.{number}.q": Factors(
            torch.randn(rank, width, generator=chance), torch.randn(5, rank, generator=chance), 0.5
        )
        for number in range(2)
    }
    return Expert(name, layers, base="toy")


@pytest.fixture
def mole(monkeypatch, capsys, tmp_path):
    """Types a command; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def mole(command):
        monkeypatch.setattr(sys, "argv", ["mole", *shlex.split(command)])
        main()
        return capsys.readouterr().out

    return mole


@pytest.fixture
def shelf(tmp_path):
    library = ExpertLibrary.open(tmp_path / "shelf", create=True)
    for seed, name in enumerate(("past", "plural", "french")):
        library.add(one(name, seed), task=f"{name}_task", training={"steps": seed})
    return library


def test_peft_folders_go_in_and_out_byte_for_byte(mole, tmp_path):
    write_peft(one("past"), tmp_path / "past")
    assert "past is in" in mole("library add --library shelf --folder past --task tense")
    mole("library add --library shelf --folder past --expert twin")
    mole("library export --library shelf --expert past --folder out/past")
    for file in (tmp_path / "past").iterdir():
        assert (tmp_path / "out/past" / file.name).read_bytes() == file.read_bytes()
    library = ExpertLibrary.open(tmp_path / "shelf")
    assert sorted(library) == ["past", "twin"] and library["past"].info.task == "tense"


def test_an_export_takes_the_place_of_an_expert_alone(mole, shelf, tmp_path, capsys):
    for name in ("past", "plural"):
        mole(f"library export --library shelf --expert {name} --folder out/expert")
    assert torch.equal(
        read_peft(tmp_path / "out/expert").layers["layers.0.q"].a,
        shelf["plural"].expert.layers["layers.0.q"].a,
    )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    for folder in ("thesis", "."):
        with pytest.raises(SystemExit) as ended:
            mole(f"library export --library shelf --expert past --folder {folder}")
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.startswith("error: folder: ")
    assert (tmp_path / "thesis/chapter.tex").read_text() == "years of work"


def test_show_lists_and_tells_all_of_one(mole, shelf, tmp_path):
    shelf.auxiliary.put("notes", {"past": [1]})
    shelf.remove("french")
    listed = mole(f"library show --library local://{tmp_path}/shelf")
    assert [line.split()[:4] for line in listed.splitlines()[1:3]] == [
        ["past", "past_task", "toy", "2"], ["plural", "plural_task", "toy", "2"],
    ]  # fmt: skip
    assert "french was removed" in listed
    told = yaml.safe_load(mole("library show --library shelf --expert past"))
    assert told["task"] == "past_task" and told["auxiliary"] == ["notes"]
    assert told["training"] == {"steps": 0} and len(told["history"]) == 1


def test_remove_restore_rename_clone(mole, shelf, tmp_path):
    mole("library remove --library shelf --expert past")
    assert sorted(shelf) == ["french", "plural"]
    mole("library restore --library shelf --expert past")
    mole("library rename --library shelf --expert past --to tense")
    assert sorted(shelf) == ["french", "plural", "tense"]
    assert "has 2 experts" in mole("library clone --library shelf --to copy --experts tense,french")
    copy = ExpertLibrary.open(tmp_path / "copy")
    assert copy["tense"].info.version == shelf["tense"].info.version


def test_an_older_version_comes_back(mole, shelf, tmp_path):
    old = shelf["past"].info.version
    write_peft(one("past", 9), tmp_path / "new")
    config = tmp_path / "new/adapter_config.json"
    config.write_text(config.read_text() + "\n")
    mole("library add --library shelf --folder new --expert past --replace")
    assert shelf["past"].info.version != old
    mole("library export --library shelf --expert past --folder again")
    for file in (tmp_path / "new").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    mole(f"library restore --library shelf --expert past --version {old[:8]}")
    assert shelf["past"].info.version == old


def test_check_tells_every_damage(mole, shelf, capsys):
    assert "every file is as it was written" in mole("library check --library shelf")
    for name in ("past", "french"):
        (shelf[name].path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(SystemExit) as ended:
        mole("library check --library shelf")
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "2 faults" in told and "'past'" in told and "'french'" in told


def test_clusters_as_json_picture_and_experts(mole, shelf, tmp_path):
    near = one("near", 0)
    shelf.add(near, task="a_task,past_task")
    told = mole("library cluster --library shelf --k 3 --output out/mbc_3.json")
    found = Clusters.load(tmp_path / "out/mbc_3.json")
    assert {"near", "past"} in map(set, found.groups) and "near, past" in told
    assert (tmp_path / "out/mbc_3.svg").read_text().startswith("<svg")
    wanted = yaml.safe_load((tmp_path / "out/mbc_3.yaml").read_text())["experts"]
    assert sorted(wanted) == ["cluster_1_of_3", "cluster_2_of_3", "cluster_3_of_3"]
    assert sorted(wanted.values()) == ["a_task,past_task", "french_task", "plural_task"]
    mole(
        "library cluster --library shelf --k 1 --by factors --experts past,near --output out/f.json"
    )
    assert json.loads((tmp_path / "out/f.json").read_text())["measure"] == "flattened factors"


def test_merges_are_not_clustered_unless_named(mole, shelf, tmp_path):
    shelf.add(one("mean", 8), training={"merged": "uniform"})
    mole("library cluster --library shelf --k 1 --output out/all.json")
    assert "mean" not in Clusters.load(tmp_path / "out/all.json").names


def test_diff_of_libraries(mole, shelf, tmp_path):
    twin = shelf.clone(tmp_path / "twin")
    assert mole("library diff --library shelf --other twin") == "3 the same\n"
    twin.rename("french", "gallic")
    twin.remove("plural")
    twin.add(one("german", 7))
    old = shelf["past"].expert
    double = {path: Factors(f.a, f.b, 2 * f.scale) for path, f in old.layers.items()}
    twin.replace(Expert("past", double, base="toy"), task="other")
    told = mole("library diff --library shelf --other twin").splitlines()
    assert told[:3] == ["removed  plural", "added    german", "renamed  french to gallic"]
    norm = sum(float(f.delta().square().sum()) for f in old.layers.values()) ** 0.5
    assert told[3] == (
        f"changed  past: norm {norm:.4g}, now {2 * norm:.4g}, cosine 1.0000, changed by 1.0000 of "
        "it"
    )
    assert "         task was 'past_task', is 'other'" in told and told[-1] == "0 the same"


def test_diff_of_versions(mole, shelf):
    first = shelf["past"].info.version
    shelf.replace(one("past", 5), task="past_task")
    shelf.remove("past")
    shelf.restore("past")
    told = mole(f"library diff --library shelf --expert past --version {first[:10]}")
    assert told.startswith("changed  past: norm ") and "training was {'steps': 0}, is {}" in told
    same = mole(
        f"library diff --library shelf --expert past --version {first} --other_version {first}"
    )
    assert same == "same     past: the same weights\n"


def test_updates_that_cannot_be_compared_are_told_apart(mole, shelf, tmp_path):
    twin = ExpertLibrary.open(tmp_path / "twin", create=True)
    twin.add(one("past", width=7))
    told = mole("library diff --library shelf --other twin")
    assert "changed  past: other weights; similarity: at layers.0.q" in told


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("show --library nowhere", "as the first `mole library add` does"),
        ("show --library a_file", "a_file is a file, expected the folder of a library"),
        (f"show --library {'x' * 300}", "the store could not be read or written"),
        ("show --library a_file/below", "a_file is a file, expected the folder of a library"),
        ("add --library a_file/below --folder past_folder", "a_file is a file"),
        ("show --library zip://nowhere.zip", "zip://nowhere.zip cannot be opened"),
        ("show --library hf://a*b/c", "hf://a*b/c: the store could not be read or written"),
        ("show --library shelf --expert bob", "has no expert 'bob'; it has french, past, plural"),
        ("add --library shelf --folder nowhere", "nowhere"),
        ("add --library shelf --folder past_folder --expert past", "'past'"),
        ("add --library shelf --folder past_folder --expert a/b", "name is 'a/b'"),
        ("remove --library shelf --expert bob", "has no expert 'bob'"),
        ("rename --library shelf --expert past --to plural", "plural"),
        ("restore --library shelf --expert past --version 12345", "'12345' is no version"),
        ("clone --library shelf --to copy --experts past,bob", "has no expert 'bob'"),
        ("cluster --library shelf --k 9", "k is 9, and there are 3 experts"),
        ("cluster --library shelf --k 2 --output out/mbc", "expected a .json file"),
        ("cluster --library shelf --experts past,past", "past is named twice"),
        ("cluster --library shelf --k 2 --output folder.json", "folder.svg is a folder"),
        ("diff --library shelf", "other is not given"),
        ("diff --library shelf --other shelf --version 1", "version is given, and no expert"),
        ("diff --library shelf --expert past --version 1f1f", "is no version of 'past'"),
        ("show --library hf://bob", "expected hf://USER/REPO"),
        ("show --library az://account", "expected az://ACCOUNT/CONTAINER"),
        ("show --librari shelf", "--librari"),
        ("best --library shelf --task tense", "no expert has a score of 'exact_match'"),
    ],
)
def test_a_mistake_is_one_message(mole, shelf, tmp_path, capsys, command, message):
    write_peft(one("past"), tmp_path / "past_folder")
    (tmp_path / "a_file").write_text("words")
    (tmp_path / "folder.svg").mkdir()
    before = sorted(shelf)
    with pytest.raises(SystemExit) as ended:
        mole(f"library {command}")
    assert ended.value.code == 2 and sorted(shelf) == before
    assert not (tmp_path / "folder.json").exists()
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in told


def test_what_is_refused_begins_no_library(mole, tmp_path, capsys):
    write_peft(one("past"), tmp_path / "past folder")
    for more in ("", " --expert past --replace"):
        with pytest.raises(SystemExit):
            mole(f"library add --library begun --folder 'past folder'{more}")
    assert not (tmp_path / "begun").exists()


def test_a_clone_of_what_is_not_there_begins_no_library(mole, shelf, tmp_path):
    with pytest.raises(SystemExit):
        mole("library clone --library shelf --to copy --experts past,bob")
    next((tmp_path / "shelf/experts/past").rglob("expert.json")).write_bytes(b"")
    with pytest.raises(SystemExit):
        mole("library clone --library shelf --to copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), RuntimeError("lost")])
def test_a_store_that_fails_is_one_message(mole, shelf, monkeypatch, capsys, fault):
    def fail(self, path, **how):
        raise fault

    monkeypatch.setattr(Disk, "cat_file", fail)
    with pytest.raises(SystemExit) as ended:
        mole("library show --library shelf")
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: shelf: the store could not be read")
    assert str(fault) in told


def test_a_fault_of_the_house_keeps_its_traceback(mole, shelf, monkeypatch):
    monkeypatch.setattr(ExpertLibrary, "list", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mole("library show --library shelf")


def test_a_damaged_expert_is_told_where_it_is_needed(mole, shelf, capsys, tmp_path):
    (shelf["past"].path / "adapter_model.safetensors").unlink()
    assert "damaged: expert 'past'" in mole("library show --library shelf")
    with pytest.raises(SystemExit) as ended:
        mole("library cluster --library shelf --k 2")
    assert ended.value.code == 2 and "or name the other experts" in capsys.readouterr().err
    mole("library cluster --library shelf --k 2 --experts plural,french --output two.json")
    assert (tmp_path / "two.json").exists()


def test_help_teaches(mole, capsys):
    with pytest.raises(SystemExit):
        mole("--help")
    told = capsys.readouterr().out
    assert "    mole library show --library local://out/library\n" in told
    with pytest.raises(SystemExit):
        mole("library cluster --help")
    assert "--k K" in capsys.readouterr().out


def test_a_library_is_looked_at_without_what_loads_a_base(shelf, tmp_path):
    code = (
        "import sys; from apps.mole import main\n"
        "sys.argv = ['mole', 'library', 'show', '--library', 'shelf']\n"
        "main()\n"
        "sys.exit(', '.join({'transformers', 'peft', 'lm_eval'} & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "past_task" in done.stdout
