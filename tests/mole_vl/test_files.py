"""Folders are complete or absent, whoever else writes them."""

import threading

import pytest

from mole_vl.files import new_file, new_folder, read_object, read_text


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


def test_text_is_utf8_and_an_object_is_one(tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xbc"}')
    assert read_text(file) == '{"a": "ü"}'
    assert read_object(file) == {"a": "ü"}
    for content, told in [
        (b"\xff", "no UTF-8 text"),
        (b"{", "is no JSON"),
        (b"[]", "holds a list, expected an object"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"file.json:? {told}"):
            read_object(file)


def test_a_file_is_written_to_no_folders_place_and_into_no_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path, told in [
        (tmp_path / "file/more/new", "file is a file, expected a folder for new"),
        (tmp_path / "folder", "folder is a folder, expected a file"),
    ]:
        with pytest.raises(ValueError, match=told), new_file(path):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
