import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "benchmarks/results.py"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("benchmark_results", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interval_covers_the_mean_of_a_known_distribution(results):
    chance = np.random.default_rng(1)
    found = [results.measured("m", "a", chance.normal(2.0, 1.0, 80), 500) for _ in range(200)]
    covered = np.mean([row.low <= 2.0 <= row.high for row in found])
    assert 0.88 < covered < 0.99
    assert all(row.low <= row.mean <= row.high for row in found)


def test_the_file_says_how_its_numbers_came_about(results, tmp_path, capsys):
    row = results.measured("exact match", "gates", [1.0, 0.0, 1.0, 1.0])
    file = results.write_results("toy", [row], settings={"lr": 1}, seeds=[0], folder=tmp_path)
    content = json.loads(file.read_text())
    assert content.keys() == {
        "name", "commit", "machine", "versions", "settings", "seeds", "rows",
    }  # fmt: skip
    assert content["rows"][0]["n"] == 4
    assert content["rows"][0]["mean"] == 0.75
    assert "| exact match | gates | 4 | 0.750 |" in capsys.readouterr().out


def test_a_median_has_its_own_interval(results):
    units = [1.0, 1.0, 1.0, 1.0, 1000.0]
    row = results.measured("median", "a", units, 500, centre=np.median)
    assert (row.low, row.mean) == (1.0, 1.0)
    assert results.measured("mean", "a", units, 500).mean > 200
