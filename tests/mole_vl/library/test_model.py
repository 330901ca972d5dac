"""At random changes a library is what a plain dictionary would be; the benchmark of faults too."""

import importlib
import random

import pytest

FOLDER = "benchmarks"


@pytest.fixture
def writers(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("library_writers")


@pytest.mark.parametrize("seed", range(3))
def test_random_changes_are_those_of_a_dictionary(writers, seed, tmp_path):
    chance = random.Random(seed)
    place = writers.Place(f"virtual://model{seed}" if seed else f"local://{tmp_path}")
    library, shelf, done = place.open(), writers.Shelf(), set()
    for _ in range(30):
        step = shelf.step(chance, writers.ACTS)
        writers.change(library, place, step)
        shelf = shelf.after(step)
        done.add(step.act)
        found = place.open()
        assert {name: found[name].expert.digest for name in found} == shelf.present
        assert library.list().removed.keys() == shelf.removed.keys()
        if step.act == "clone":
            clone = place.open(clone=f"clone{step.seed}")
            assert {name: clone[name].info.digest for name in clone} == shelf.present
    assert len(done) > 4
    assert library.check() == type(library.check())(faults=(), leftovers=())


def test_the_benchmark_tells_damage_from_none(writers, tmp_path, monkeypatch):
    faults = importlib.import_module("library_faults")
    untold, others, kept = faults.damages(tmp_path / "sound", 6)
    assert (untold.mean, others.mean) == (0, 0)
    assert kept.n == 6
    # Of a file that is as it was no error tells.
    monkeypatch.setattr(faults, "harm", lambda *_: None)
    untold, _, kept = faults.damages(tmp_path / "whole", 2)
    assert (untold.mean, kept.mean) == (1, 0)
