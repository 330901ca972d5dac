"""Addresses, credentials and extras."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile

from mole_vl.library import ExpertLibrary, addresses
from tests.mole_vl.library.shelf import expert, same

ROOT = Path(__file__).parents[3]


def test_addresses_of_the_disk_are_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ExpertLibrary.open("local://shelf", create=True).add(expert("past"))
    for uri in ["shelf", "local://./shelf", f"file://{tmp_path}/shelf", tmp_path / "shelf"]:
        assert list(ExpertLibrary.open(uri)) == ["past"]


def test_folders_with_signs_of_patterns_are_plain_folders(tmp_path):
    ExpertLibrary.open(tmp_path / "a[b]*?", create=True).add(expert("past"))
    assert same(ExpertLibrary.open(tmp_path / "a[b]*?")["past"].expert, expert("past"))


def test_memory_is_one_for_a_process():
    ExpertLibrary.open("virtual://one/shelf", create=True).add(expert("past"))
    assert list(ExpertLibrary.open("virtual://one/shelf")) == ["past"]
    with pytest.raises(FileNotFoundError):
        ExpertLibrary.open("virtual://one")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("sv=2024&sig=abc", {"account_name": "ann", "sas_token": "sv=2024&sig=abc"}),
        ("AccountName=a;AccountKey=b", {"connection_string": "AccountName=a;AccountKey=b"}),
        (None, {"account_name": "ann"}),
    ],
)
def test_azure_is_translated_for_adlfs(monkeypatch, token, expected):
    seen = {}

    def url_to_fs(url, **options):
        seen.update(url=url, **options)
        return addresses.Memory(), "/shelf/part"

    monkeypatch.setattr(addresses, "url_to_fs", url_to_fs)
    store = addresses.open_store("az://ann/shelf/part", token, {"max_concurrency": 2})
    assert store.exclusive
    assert seen["url"] == "abfs://shelf/part"
    assert {**seen, **expected, "max_concurrency": 2} == seen
    assert seen["use_listings_cache"] is False


def test_a_file_system_that_is_not_installed_is_named_with_its_address(monkeypatch):
    def url_to_fs(url, **options):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(addresses, "url_to_fs", url_to_fs)
    with pytest.raises(ModuleNotFoundError, match="gs://bucket/shelf: Please install gcsfs"):
        ExpertLibrary.open("gs://bucket/shelf")


@pytest.mark.parametrize(
    ("uri", "token", "told"),
    [
        ("az://ann", None, r"'az://ann' names no container, expected az://ACCOUNT/CONTAINER"),
        ("hf://ann", None, r"'hf://ann' names no repository, expected hf://USER/REPO"),
        ("hf://ann/a/b", None, r"names no repository"),
        ("s3://", None, r"'s3://' names no place"),
        ("local://x", "secret", r"local://x takes no token: a disk asks for none"),
        ("s3://bucket/x", "secret", r"takes no token: name the credential as fsspec does"),
        ("nowhere://x", None, r"nowhere://x: Protocol not known: nowhere"),
        ("", None, "names no folder"),
    ],
)
def test_what_is_no_address_is_refused(uri, token, told):
    with pytest.raises(ValueError, match=told) as error:
        ExpertLibrary.open(uri, token)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("uri", "extra"), [("hf://a/b", "hub"), ("az://a/b", "azure"), ("s3://a/b", "s3")]
)
def test_a_missing_extra_is_named(monkeypatch, uri, extra):
    monkeypatch.setattr(addresses, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'mole-vl\[{extra}\]'"):
        ExpertLibrary.open(uri)


def test_the_core_needs_no_fsspec_and_the_library_no_store_s_client():
    code = (
        "import sys, mole_vl\n"
        "assert not {'fsspec', 'mole_vl.library'} & set(sys.modules)\n"
        "import mole_vl.library\n"
        "clients = {'adlfs', 's3fs', 'huggingface_hub', 'transformers', 'peft'}\n"
        "assert not clients & set(sys.modules)\n"
        "for name in [n for n in sys.modules if n.startswith('mole_vl.library')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['fsspec'] = None\n"
        "import mole_vl.library\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "mole_vl.library needs fsspec, which is not installed: pip install" in done.stderr


def test_a_store_that_promises_nothing_is_read_alone(tmp_path):
    ExpertLibrary.open(tmp_path / "shelf", create=True).add(expert("past"))
    shutil.make_archive(str(tmp_path / "shelf"), "zip", tmp_path / "shelf")
    library = ExpertLibrary.open(f"zip://::{tmp_path}/shelf.zip")
    assert same(library["past"].expert, expert("past"))
    with pytest.raises(ValueError, match="the library is read, not written to: clone it"):
        library.remove("past")
    assert list(library) == ["past"]
    clone = library.clone("virtual://from-zip")
    assert same(clone["past"].expert, expert("past"))


def test_a_server_that_promises_in_vain_is_refused(monkeypatch):
    def careless(self, path, value, mode="overwrite"):
        self.store[path] = MemoryFile(self, path, value)

    monkeypatch.setattr(addresses.Memory, "pipe_file", careless)
    with pytest.raises(ValueError, match=r"creates library\.json a second time without a word"):
        ExpertLibrary.open("virtual://careless", create=True)


def test_a_disk_without_hard_links_is_refused(tmp_path, monkeypatch):
    def linkless(self, target):
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr("pathlib.Path.hardlink_to", linkless)
    with pytest.raises(OSError, match="this disk knows no hard links"):
        ExpertLibrary.open(tmp_path / "shelf", create=True)
    assert list((tmp_path / "shelf").iterdir()) == []
