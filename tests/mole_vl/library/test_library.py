"""What a library does, the same on every store."""

import pytest
import torch

from mole_vl.library import ExpertLibrary, MissingExpertError, NameTakenError
from mole_vl.library.file_store import FileStore
from tests.mole_vl.library.shelf import RANKS, expert, same


@pytest.fixture
def library(place):
    library = place.begin()
    with library.batch("the shelf") as batch:
        for seed, name in enumerate(RANKS):
            batch.add(expert(name, seed), task=f"of {name}", licence="MIT", training={"lr": 0.1})
    return library


def test_experts_come_back_bit_for_bit(library, place):
    again = place.open()
    assert list(again) == sorted(RANKS)
    assert len(again) == 4 and "past" in again and "nobody" not in again
    for seed, name in enumerate(RANKS):
        stored = again[name]
        assert same(stored.expert, expert(name, seed))
        assert stored.expert.name == name and stored.expert.base == "toy"
        assert stored.info.digest == expert(name, seed).digest
        assert (stored.info.task, stored.info.licence) == (f"of {name}", "MIT")
        assert stored.info.training == {"lr": 0.1}
        assert stored.info.ranks == tuple(sorted(set(RANKS[name])))


def test_a_place_without_a_library_is_no_empty_one(place):
    with pytest.raises(FileNotFoundError, match=r"there is no library here .* create=True"):
        place.open()
    place.begin().add(expert("past"))
    # Begun anew, it is what it was.
    assert list(place.begin()) == ["past"]


def test_removed_is_not_gone(library, place):
    library.remove("past")
    assert "past" not in place.open()
    with pytest.raises(MissingExpertError, match=r"'past': it was removed .* restore\('past'\)"):
        library.get("past")
    with pytest.raises(MissingExpertError, match="was removed"):
        library.remove("past")
    assert library.list().removed.keys() == {"past"}
    library.restore("past")
    assert same(place.open()["past"].expert, expert("past", 0))
    assert [pointer.act for pointer in library.history("past")] == ["add", "remove", "restore"]


def test_replaced_stays_in_the_history(library, place):
    old = library["past"].info.version
    new = library.replace(expert("past", 7), task="another").version
    assert same(library["past"].expert, expert("past", 7))
    assert [pointer.version for pointer in library.history("past")] == [old, new]
    with pytest.raises(NameTakenError, match=r"to go back to an older one"):
        library.restore("past")
    library.restore("past", old[:12])
    assert same(place.open()["past"].expert, expert("past", 0))
    with pytest.raises(MissingExpertError, match="'0000' is no version of 'past'; it had"):
        library.restore("past", "0000")


def test_renamed_keeps_all_but_its_name(library, place):
    library.auxiliary.put("prototypes", {"past": {"v": torch.ones(3)}})
    version = library["past"].info.version
    library.rename("past", "perfect")
    again = place.open()
    assert "past" not in again
    assert again["perfect"].info.version == version
    assert again["perfect"].expert.name == "perfect"
    assert torch.equal(again.auxiliary.get("prototypes", "perfect")["v"], torch.ones(3))
    with pytest.raises(MissingExpertError, match="'past': it is called 'perfect' since"):
        again.get("past")
    with pytest.raises(NameTakenError, match="has an expert 'german' already"):
        library.rename("perfect", "german")
    # The name is free, and its past stays its own.
    library.add(expert("past", 9))
    library.rename("perfect", "old")
    assert same(library["past"].expert, expert("past", 9))
    assert same(library["old"].expert, expert("past", 0))


def test_a_name_is_added_once(library):
    with pytest.raises(NameTakenError, match=r"has an expert 'past' already .* or replace it"):
        library.add(expert("past", 3))
    with pytest.raises(MissingExpertError, match="has no expert 'nobody'; it has french, german"):
        library.replace(expert("nobody"))
    assert same(library["past"].expert, expert("past", 0))


def test_a_batch_counts_as_one_or_not_at_all(library, place):
    with pytest.raises(ZeroDivisionError), library.batch() as batch:
        batch.remove("past")
        batch.add(expert("spanish"))
        raise ZeroDivisionError
    assert list(place.open()) == sorted(RANKS)
    with library.batch() as batch:
        batch.add(expert("spanish"))
        with pytest.raises(NameTakenError):
            batch.add(expert("spanish"))
        batch.rename("spanish", "castilian")
        batch.remove("past")
        batch.replace(expert("german", 8))
    again = place.open()
    assert list(again) == ["castilian", "french", "german", "plural"]
    assert same(again["castilian"].expert, expert("spanish"))
    assert same(again["german"].expert, expert("german", 8))


def test_auxiliary_data_are_of_a_version(library, place):
    prototypes = {"past": {"v": torch.arange(3.0)}, "german": {"v": torch.ones(2, 2)}}
    library.auxiliary.put("prototypes", prototypes)
    library.auxiliary.put("embedding", {"past": [1.5, 2], "german": {"mean": 0.1}})
    library.auxiliary.put("embedding", {"past": [3]})
    again = place.open()
    found = again.auxiliary.all("prototypes")
    assert found.keys() == {"past", "german"}
    assert torch.equal(found["german"]["v"], torch.ones(2, 2))
    assert again.auxiliary.all("embedding") == {"past": [3], "german": {"mean": 0.1}}
    assert again.auxiliary.kinds("past") == ["embedding", "prototypes"]
    library.replace(expert("past", 5))
    assert library.auxiliary.get("prototypes", "past") is None
    assert library.auxiliary.kinds("past") == []
    library.restore("past", library.history("past")[0].version)
    assert torch.equal(library.auxiliary.get("prototypes", "past")["v"], torch.arange(3.0))


def test_the_best_expert_for_a_task(library, place):
    library.scores.put("glue/sst2", {"past": 0.5, "german": 0.75, "french": 0.75})
    library.scores.put("glue/sst2", {"past": 2.5, "german": 1.5}, measure="loss")
    again = place.open()
    assert again.scores.get("glue/sst2") == {"past": 0.5, "german": 0.75, "french": 0.75}
    assert again.scores.best("glue/sst2") == "french"
    assert list(again.scores.ranked("glue/sst2")) == ["french", "german", "past"]
    assert again.scores.best("glue/sst2", "loss", highest=False) == "german"
    library.scores.put("glue/sst2", {"french": 0.1})
    assert again.scores.best("glue/sst2") == "german"
    with pytest.raises(LookupError, match="no expert has a score of 'accuracy' for the task 'x'"):
        library.scores.best("x")
    with pytest.raises(ValueError, match=r"past's is nan, expected a finite number"):
        library.scores.put("x", {"past": float("nan")})


def test_a_clone_is_whole_and_its_own(library, place, new_place):
    library.auxiliary.put("prototypes", {"past": {"v": torch.ones(3)}})
    library.scores.put("t", {"past": 0.5})
    library.rename("plural", "many")
    library.remove("german")
    for kind in ("disk", "memory"):
        target = new_place(kind)
        clone = ExpertLibrary.open(place.uri, destination=target.uri, **place.how)
        assert clone.address == target.uri
        assert list(clone) == ["french", "many", "past"]
        assert same(clone["many"].expert, expert("plural", 1))
        assert clone["past"].info == library["past"].info
        assert clone.scores.best("t") == "past"
        assert torch.equal(clone.auxiliary.get("prototypes", "past")["v"], torch.ones(3))
        # Again, with news; what is there stays.
        library.restore("german")
        clone.remove("french")
        library.clone(target.uri)
        assert list(target.open()) == ["french", "german", "many", "past"]
        clone.replace(expert("past", 4))
        with pytest.raises(NameTakenError, match="of the names past: nothing was copied"):
            library.clone(target.uri)
        library.remove("german")
        assert clone.check().faults == () == library.check().faults


def test_every_store_can_be_cloned_to(place, new_place):
    source = new_place("memory").begin()
    source.add(expert("spanish"))
    source.add(expert("german", 3))
    source.auxiliary.put("prototypes", {"spanish": {"v": torch.zeros(1)}})
    for names in (["spanish"], None):
        clone = source.clone(place.uri, names=names, **place.how)
    assert list(place.open()) == ["german", "spanish"]
    assert same(clone["german"].expert, expert("german", 3))
    assert clone.auxiliary.all("prototypes").keys() == {"spanish"}
    assert clone.check() == source.check()


def test_the_list_for_people_names_every_expert(library):
    def lines():
        content = library._store.read(["README.md"], library._store.mark())["README.md"]
        return [line for line in content.decode().splitlines() if line.startswith("| ")][1:]

    assert [line.split("|")[1].strip() for line in lines()] == sorted(RANKS)
    library.replace(expert("past"), task="a|b\nc")
    library.remove("german")
    assert [line.split("|")[1].strip() for line in lines()] == ["french", "past", "plural"]
    assert any("a\\|b c" in line for line in lines())


def test_names_that_would_leave_the_folder_are_refused(library, tmp_path):
    for name in ["../past", "a/b", "..", ".", "", "a\\b", "a b", "C:", "a*", "x" * 101, "a."]:
        with pytest.raises(ValueError, match=r"name is .*, expected"):
            library.rename("past", name)
    for name in ["..", "a*b", ".hidden", "é"]:
        if name != "..":
            with pytest.raises(ValueError, match=r"name is .*, expected at most 100 letters"):
                library.add(expert(name))
        with pytest.raises(ValueError, match=r"kind is .*, expected at most 100 letters"):
            library.auxiliary.put(name, {"past": 1})
    assert list(library) == sorted(RANKS)


def test_only_what_can_be_written_is_taken(library):
    for about, told in [
        ({"training": {"f": print}}, "'spanish': training cannot be written as JSON"),
        ({"training": {"lr": float("nan")}}, "training cannot be written as JSON"),
        ({"training": [1]}, "training is a list, expected a Mapping"),
        ({"task": 3}, "task is a int, expected a str"),
    ]:
        with pytest.raises(ValueError, match=told):
            library.add(expert("spanish"), **about)
    assert "spanish" not in library
    assert library.check().leftovers == ()


def test_what_is_said_of_an_expert_under_no_known_word_is_refused(tmp_path):
    library = ExpertLibrary.open(tmp_path / "shelf", create=True)
    with pytest.raises(ValueError, match="lisence is unknown, expected task, licence, training"):
        library.add(expert("past"), **{"lisence": "MIT"})
    with pytest.raises(ValueError, match=r"task is .*, which holds half a character"):
        library.add(expert("past"), task="\ud800")
    with pytest.raises(ValueError, match="'past': training cannot be written as JSON"):
        library.add(expert("past"), training={"by": "\ud800"})
    assert list(library) == []


def test_data_that_share_memory_come_back_and_kinds_are_words(tmp_path):
    library = ExpertLibrary.open(tmp_path / "shelf", create=True)
    library.add(expert("past"))
    one = torch.ones(3)
    library.auxiliary.put("notes", {"past": {"one": one, "same": one}})
    found = library.auxiliary.get("notes", "past")
    assert torch.equal(found["one"], one) and torch.equal(found["same"], one)
    with pytest.raises(ValueError, match="kind is 'notes/more'"):
        library.auxiliary.put("notes/more", {"past": [1]})
    assert library.auxiliary.kinds("past") == ["notes"]


def test_a_name_that_leaves_its_folder_has_no_history(tmp_path, monkeypatch):
    library = ExpertLibrary.open(tmp_path / "shelf", create=True)
    monkeypatch.setattr(FileStore, "find", None)
    for name in ("..", "../../..", "a/b", ""):
        with pytest.raises(MissingExpertError, match="there was never an expert"):
            library.history(name)
