"""A writer may die between any two files, before or after one: what counted counts, all of it."""

import itertools
from dataclasses import replace

import pytest

from mole_vl.library import ExpertLibrary, NameTakenError, transaction
from mole_vl.library.cloning import clone
from mole_vl.library.pointers import commit_path, fate_contents
from tests.mole_vl.library.shelf import expert, same


class Killed(BaseException):
    """No handler of an error sees it."""


class Dying:
    """A file system whose writer dies at the n-th file."""

    def __init__(self, files, fatal, written):
        self.files, self.fatal, self.written = files, fatal, written

    def __getattr__(self, name):
        return getattr(self.files, name)

    def pipe_file(self, path, value, mode="overwrite"):
        self.fatal -= 1
        if self.fatal >= 0 or self.written:
            self.files.pipe_file(path, value, mode=mode)
        if self.fatal < 0:
            raise Killed(path)


def batch(library):
    with library.batch() as changes:
        changes.add(expert("spanish"))
        changes.remove("german")
        changes.rename("past", "perfect")


OPERATIONS = {
    "add": lambda library: library.add(expert("spanish")),
    "replace": lambda library: library.replace(expert("past", 7)),
    "remove": lambda library: library.remove("past"),
    "restore": lambda library: library.restore("gone"),
    "rename": lambda library: library.rename("past", "perfect"),
    "batch": batch,
}


def state(library):
    """What every name stands for, each expert read."""
    return {name: library[name].expert.digest for name in library}


def shelf(place):
    library = place.begin()
    for seed, name in enumerate(["past", "german", "gone"]):
        library.add(expert(name, seed))
    library.remove("gone")
    return library


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(transaction, "PATIENCE", 0.01)


@pytest.mark.parametrize("kind", ["disk", "memory"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_a_killed_change_is_whole_or_absent(kind, operation, written, new_place):
    change = OPERATIONS[operation]
    for fatal in itertools.count():
        place = new_place(kind)
        library = shelf(place)
        before = state(library)
        dying = replace(library._store, files=Dying(library._store.files, fatal, written))
        try:
            change(ExpertLibrary(dying, None))
        except Killed as death:
            found = place.open()
            now = state(found)
            again = now == before
            if again:
                change(found)
            assert found.check().faults == ()
            assert state(found) == state(place.open())
            assert again or state(found) == now
            # The list for people is all that may be behind.
            assert again or str(death).endswith("README.md") or written
            after = state(found)
        else:
            break
    assert fatal > 1
    assert state(library) == after != before


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_a_killed_clone_goes_on(new_place, written):
    source = shelf(new_place("memory"))
    source.auxiliary.put("prototypes", {"past": [1, 2]})
    place = new_place("memory")
    target = place.begin()
    for fatal in itertools.count():
        dying = replace(target._store, files=Dying(target._store.files, fatal, written))
        try:
            transfer(source, dying)
        except Killed:
            assert list(place.open()) in ([], ["german", "past"])
        else:
            break
    assert state(place.open()) == state(source)
    assert place.open().auxiliary.get("prototypes", "past") == [1, 2]
    # Each try brought what the one before it had not.
    assert fatal < 12


def transfer(source, store):
    clone(source._catalogue, ExpertLibrary(store, None)._catalogue, None)


def test_an_answer_lost_on_its_way_is_no_other_writer(new_place):
    library = new_place("memory").begin()

    class Twice(Dying):
        def pipe_file(self, path, value, mode="overwrite"):
            for _ in range(2):
                self.files.pipe_file(path, value, mode=mode)

    files = Twice(library._store.files, 0, True)
    ExpertLibrary(replace(library._store, files=files), None).add(expert("past"))
    assert same(library["past"].expert, expert("past"))
    assert len(library.history("past")) == 1


def test_a_change_under_way_is_waited_for(new_place, monkeypatch):
    place = new_place("memory")
    library = shelf(place)
    dying = replace(library._store, files=Dying(library._store.files, 2, False))
    with pytest.raises(Killed):
        ExpertLibrary(dying, None).rename("past", "perfect")
    (unfinished,) = library.check().leftovers
    commit = unfinished.split()[1]
    pointers = ["names/perfect/000001.json", "names/past/000002.json"]
    fate = {commit_path(commit): fate_contents(commit, pointers)}
    monkeypatch.setattr(transaction, "PATIENCE", 60.0)
    # Its writer comes to the end after all.
    seen = []
    monkeypatch.setattr(
        transaction.time,
        "sleep",
        lambda _: seen.append(library._store.ensure(fate)),
    )
    with pytest.raises(NameTakenError, match="has an expert 'perfect' already"):
        library.add(expert("perfect", 8))
    assert len(seen) == 1
    assert list(library) == ["german", "perfect"]
