"""Folders are complete or absent, whoever else writes them."""

import threading

import pytest

from mole_vl.files import new_folder


def write(folder, mark):
    with new_folder(folder) as partial:
        for number in range(5):
            (partial / str(number)).write_text(mark)


def test_of_many_who_write_one_folder_at_once_one_is_there_whole(tmp_path):
    faults = []

    def often(mark):
        try:
            for _ in range(40):
                write(tmp_path / "folder", mark)
        except OSError as error:
            faults.append(error)

    threads = [threading.Thread(target=often, args=(mark,)) for mark in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == list("01234")
    assert len({file.read_text() for file in files}) == 1


def test_a_fault_leaves_the_older_folder_as_it_was(tmp_path):
    write(tmp_path / "folder", "old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "folder") as partial:
        (partial / "0").write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder/0").read_text() == "old"


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "folder").write_text("mine")
    with pytest.raises(ValueError, match="folder is a file, expected a folder"):
        write(tmp_path / "folder", "new")
    assert (tmp_path / "folder").read_text() == "mine"
