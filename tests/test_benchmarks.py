import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def module_of(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results():
    return module_of("results")


@pytest.fixture(scope="module")
def units_class():
    return module_of("units").Units


def test_the_interval_covers_the_mean_of_a_known_distribution(results):
    chance = np.random.default_rng(1)
    found = [results.measured("m", "a", chance.normal(2.0, 1.0, 80), 500) for _ in range(200)]
    covered = np.mean([row.low <= 2.0 <= row.high for row in found])
    assert 0.88 < covered < 0.99
    assert all(row.low <= row.mean <= row.high for row in found)


def test_the_file_says_how_its_numbers_came_about(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    row = results.measured("exact match", "gates", [1.0, 0.0, 1.0, 1.0])
    file = results.write_results("toy", [row], settings={"lr": 1}, seeds=[0], folder=tmp_path)
    content = json.loads(file.read_text())
    assert content.keys() == {
        "name", "commit", "machine", "versions", "environment", "settings", "seeds", "rows",
    }  # fmt: skip
    assert content["environment"]["OMP_WAIT_POLICY"] == "passive"
    assert content["rows"][0]["n"] == 4
    assert content["rows"][0]["mean"] == 0.75
    assert "| exact match | gates | 4 | 0.750 |" in capsys.readouterr().out


def test_a_median_has_its_own_interval(results):
    units = [1.0, 1.0, 1.0, 1.0, 1000.0]
    row = results.measured("median", "a", units, 500, centre=np.median)
    assert (row.low, row.mean) == (1.0, 1.0)
    assert results.measured("mean", "a", units, 500).mean > 200


def never():
    raise AssertionError("measured a second time")


def test_units_go_on_elsewhere_from_what_was_gathered(units_class, tmp_path):
    gathered, settings = tmp_path / "units.json", {"lr": 0.1, "betas": (0.9, 0.99)}
    first = units_class(tmp_path / "here", gathered, settings)
    second = units_class(tmp_path / "here", gathered, settings)
    assert first.get("gates/a pair-0", lambda: {"seen": (1.0, 2.0)}) == {"seen": [1.0, 2.0]}
    assert second.get("gates/a pair-0", never) == {"seen": [1.0, 2.0]}
    second.get("b", lambda: {"seen": [3.0]})
    first.gather()
    elsewhere = units_class(tmp_path / "there", gathered, settings)
    assert elsewhere.get("gates/a pair-0", never) == {"seen": [1.0, 2.0]}
    assert elsewhere.get("b", never) == {"seen": [3.0]}
    before = gathered.read_bytes()
    elsewhere.gather()
    assert gathered.read_bytes() == before


def test_units_of_other_settings_are_not_these(units_class, tmp_path):
    gathered = tmp_path / "units.json"
    units = units_class(tmp_path, gathered, {"lr": 0.1})
    units.get("a", lambda: 1)
    units.gather()
    with pytest.raises(ValueError, match=r"units\.json was made with lr = 0.1, not 0.2"):
        units_class(tmp_path, gathered, {"lr": 0.2})
    assert units_class(tmp_path, tmp_path / "others.json", {"lr": 0.2}).get("a", lambda: 2) == 2


def test_a_unit_of_its_own_settings_is_kept_when_others_join(units_class, tmp_path):
    gathered = tmp_path / "units.json"
    units = units_class(tmp_path / "here", gathered, {"asked": 100})
    assert units.get("a", lambda: 1, {"betas": (0.9, 0.99)}) == 1
    units.gather()
    elsewhere = units_class(tmp_path / "there", gathered, {"asked": 100})
    assert elsewhere.get("a", never, {"betas": (0.9, 0.99)}) == 1
    assert elsewhere.get("b", lambda: 2, {"betas": (0.9, 0.95)}) == 2
    with pytest.raises(ValueError, match=r"a in .*units\.json was made with .*0\.9.*, not .*0\.5"):
        elsewhere.get("a", never, {"betas": (0.5, 0.99)})
