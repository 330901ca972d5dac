"""A damaged file is one clear error that names it; all other experts load."""

import shutil
from pathlib import Path

import pytest

from mole_vl.library import DamagedExpertError
from tests.mole_vl.library.shelf import expert, same


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def garble(file):
    file.write_bytes(b"\xff\x00" * 64)


def swap(file):
    """Something sound of another expert."""
    shelf = next(parent for parent in file.parents if parent.name == "shelf")
    (kind,) = (kind for kind in FILES.values() if file in shelf.glob(kind.replace("past", "*")))
    others = [
        other
        for other in shelf.glob(kind.replace("past", "*"))
        if other.read_bytes() != file.read_bytes()
    ]
    shutil.copy(others[0], file)


FILES = {
    "weights": "experts/past/*/adapter_model.safetensors",
    "config": "experts/past/*/adapter_config.json",
    "info": "experts/past/*/expert.json",
    "pointer": "names/past/000001.json",
    "fate": "commits/*.json",
}


@pytest.fixture
def shelf(tmp_path, new_place):
    place = new_place("disk")
    place.uri = f"local://{tmp_path / 'shelf'}"
    library = place.begin()
    library.add(expert("german", 1))
    # Both hang on one fate, and the weights of one are another's.
    with library.batch() as batch:
        batch.add(expert("past", 2))
        batch.add(expert("many", 3))
    library.rename("many", "plural")
    return place, tmp_path / "shelf"


@pytest.mark.parametrize(
    "harm", [cut, flip, empty, garble, swap, Path.unlink], ids=lambda harm: harm.__name__
)
@pytest.mark.parametrize("kind", FILES)
def test_each_is_named_and_the_rest_loads(shelf, kind, harm):
    place, folder = shelf
    files = sorted(folder.glob(FILES[kind]))
    past = place.open()["past"]
    file = files[0]
    if kind == "fate":
        (file,) = (file for file in files if "past" in file.read_text())
    harm(file)
    library = place.open()
    assert same(library["german"].expert, expert("german", 1))
    name = str(file.relative_to(folder))
    if harm is Path.unlink and kind in ("pointer", "fate"):
        # Nothing says any more that it was added. That something lies there without a name does.
        assert "past" not in library
        left = library.check().leftovers
        assert past.folder in left
        library.restore("past", past.info.version)
        assert same(library["past"].expert, expert("past", 2))
        return
    assert "past" in library
    with pytest.raises(DamagedExpertError, match=r"expert 'past' of .* is damaged: ") as told:
        _ = library["past"].expert
    assert told.value.name == "past"
    assert name in str(told.value)
    report = library.check()
    assert any(name in fault for fault in report.faults)
    listing = library.list()
    assert "german" in listing.experts
    if not (kind in ("weights", "config") and harm in (flip, swap)):
        # Of those two, only reading them tells.
        assert name in listing.damaged["past"]
    # Put there anew, all is well.
    library.replace(expert("past", 2))
    assert same(place.open()["past"].expert, expert("past", 2))


def test_a_damaged_past_is_told_and_does_not_harm_the_present(shelf):
    place, folder = shelf
    library = place.open()
    library.replace(expert("german", 5))
    flip(folder / "names/german/000001.json")
    library = place.open()
    assert same(library["german"].expert, expert("german", 5))
    with pytest.raises(DamagedExpertError, match=r"names/german/000001\.json is"):
        library.history("german")
    assert any("names/german/000001.json" in fault for fault in library.check().faults)


def test_a_damaged_pointer_can_be_set_right(shelf):
    place, folder = shelf
    version = place.open()["german"].info.version
    garble(folder / "names/german/000001.json")
    library = place.open()
    with pytest.raises(DamagedExpertError, match=r"restore\('german', version=\.\.\.\)"):
        library.restore("german")
    for change in (lambda: library.remove("german"), lambda: library.rename("german", "g")):
        with pytest.raises(DamagedExpertError, match=r"names/german/000001\.json"):
            change()
    library.restore("german", version[:8])
    assert same(place.open()["german"].expert, expert("german", 1))


def test_half_of_a_change_that_counts_is_missed(shelf):
    place, folder = shelf
    (folder / "names/plural/000001.json").unlink()
    library = place.open()
    with pytest.raises(DamagedExpertError, match=r"names/plural/000001\.json, of commits/.*, is"):
        library.get("plural")
    assert library.list().damaged.keys() == {"plural"}
    assert same(library["past"].expert, expert("past", 2))


def test_damaged_data_are_told(shelf):
    place, folder = shelf
    library = place.open()
    library.auxiliary.put("embedding", {"past": [1], "german": [2]})
    version = library["past"].info.version
    file, entry = sorted((folder / "auxiliary" / version / "embedding").iterdir())
    whole = file.read_bytes()
    for gone in (file, entry):
        kept = gone.read_bytes()
        gone.unlink()
        assert any(f"{gone.name} is missing" in fault for fault in place.open().check().faults)
        if gone == file:
            with pytest.raises(DamagedExpertError, match=f"{file.name} is missing"):
                place.open().auxiliary.get("embedding", "past")
        gone.write_bytes(kept)
    flip(entry)
    assert any(entry.name in fault for fault in place.open().check().faults)
    entry.write_bytes(kept)
    assert file.read_bytes() == whole
    flip(file)
    library = place.open()
    with pytest.raises(DamagedExpertError, match=f"embedding of expert 'past' .*{file.name}"):
        library.auxiliary.all("embedding")
    assert library.auxiliary.get("embedding", "german") == [2]
    assert any(file.name in fault for fault in library.check().faults)
    library.auxiliary.put("embedding", {"past": [3]})
    assert library.auxiliary.all("embedding") == {"past": [3], "german": [2]}
    # What is out of date is looked at too, and what is nobody's.
    (folder / "auxiliary/stranger.txt").write_text("?")
    faults = place.open().check().faults
    assert {fault.split()[1] for fault in faults} == {
        f"auxiliary/{version}/embedding/{file.name}", "auxiliary/stranger.txt",
    }  # fmt: skip


def test_a_damaged_library_is_not_cloned_in_part(shelf, new_place):
    place, folder = shelf
    flip(next(folder.glob(FILES["weights"])))
    library, target = place.open(), new_place("memory")
    with pytest.raises(DamagedExpertError, match="expert 'past'"):
        library.clone(target.uri)
    assert list(target.open()) == []
    library.clone(target.uri, names=["german", "plural"])
    assert list(target.open()) == ["german", "plural"]


def test_a_file_without_a_format_is_no_library(shelf):
    place, folder = shelf
    flip(folder / "library.json")
    with pytest.raises(ValueError, match=r"library\.json is (damaged|no JSON)"):
        place.open()


def test_a_folder_that_cannot_be_listed_is_no_empty_one(shelf, monkeypatch):
    place, _ = shelf
    library = place.open()
    kind = type(library._store.files)
    listed = kind.ls

    def ls(self, path, detail=True, **how):
        if str(path).endswith("names/past"):
            raise PermissionError(13, "Permission denied", path)
        return listed(self, path, detail, **how)

    monkeypatch.setattr(kind, "ls", ls)
    with pytest.raises(PermissionError, match="names/past"):
        list(library)
    monkeypatch.undo()
    assert list(library) == ["german", "past", "plural"]
