"""Weights are read when they are asked for, from mapped files."""

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from mole_vl import Expert, Factors, read_peft, write_peft
from mole_vl.library import DamagedExpertError
from mole_vl.peft_folder import WEIGHTS
from tests.mole_vl.library.shelf import expert, same
from tests.toys import Toy


def test_a_hundred_are_listed_without_their_weights(place, monkeypatch):
    library = place.begin()
    count = 100 if place.uri.startswith(("local", "virtual")) else 10
    with library.batch() as batch:
        for number in range(count):
            batch.add(expert(f"e{number}", number), task=f"t{number % 7}")
    library = place.open()
    store = library._store
    read = []
    kind = type(store)
    monkeypatch.setattr(kind, "read", noting(kind.read, read))
    listing = library.list()
    assert len(listing.experts) == len(library) == count
    assert listing.experts["e8"].task == "t1"
    assert {e.digest for e in listing.experts.values()} >= {expert("e3", 3).digest}
    stored = library["e9"]
    assert read and not any(path.endswith(WEIGHTS) for path in read)
    assert same(stored.expert, expert("e9", 9))


def noting(read, paths):
    def noted(self, wanted, mark=None):
        wanted = list(wanted)
        paths.extend(wanted)
        return read(self, wanted, mark)

    return noted


@pytest.mark.skipif(sys.platform != "linux", reason="looks at a process's maps")
@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_the_factors_are_views_of_a_mapped_file(new_place, kind):
    place = new_place(kind)
    place.begin().add(expert("past", dtype=torch.bfloat16))
    stored = place.open()["past"]
    assert "adapter_model" not in Path("/proc/self/maps").read_text()
    loaded = stored.expert
    maps = Path("/proc/self/maps").read_text().splitlines()
    (line,) = (line for line in maps if line.endswith(str(stored.path / WEIGHTS)))
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    for factors in loaded.layers.values():
        assert start <= factors.a.data_ptr() < end and start <= factors.b.data_ptr() < end
    assert same(loaded, expert("past", dtype=torch.bfloat16))


def test_a_remote_expert_is_fetched_once_and_checked_always(new_place, tmp_path):
    place = new_place("s3")
    place.begin().add(expert("past"))
    library = place.open()
    kept = library["past"].path
    assert kept.parent == tmp_path / "cache/experts"
    library._store.files.rm(f"{library._store.root}/experts", recursive=True)
    # It is asked for what is known of it alone.
    assert same(library["past"].expert, expert("past"))
    (kept / WEIGHTS).write_bytes(b"harmed")
    with pytest.raises(DamagedExpertError, match="safetensors is missing"):
        _ = library["past"].expert


def test_a_harmed_copy_is_fetched_anew(new_place):
    place = new_place("s3")
    place.begin().add(expert("past"))
    (place.open()["past"].path / WEIGHTS).write_bytes(b"harmed")
    assert same(place.open()["past"].expert, expert("past"))


def test_memory_is_not_written_to_the_disk(new_place, tmp_path):
    place = new_place("memory")
    place.begin().add(expert("past"))
    assert place.open()["past"].path is None
    assert same(place.open()["past"].expert, expert("past"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_library_is_peft_s(new_place):
    model = Toy()
    names = [name for name, _ in model.named_modules() if name.endswith((".q", ".k"))]
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    chance = torch.Generator().manual_seed(3)
    layers = {
        name: Factors(
            torch.randn(rank + 1, shape[1], generator=chance),
            torch.randn(shape[0], rank + 1, generator=chance),
            0.5,
        )
        for rank, (name, shape) in enumerate(shapes.items())
    }
    library = new_place("disk").begin()
    library.add(Expert("mixed", layers))
    adapted = PeftModel.from_pretrained(model, str(library["mixed"].path))
    for name in names:
        module = adapted.base_model.model.get_submodule(name)
        torch.testing.assert_close(module.get_delta_weight("default"), layers[name].delta())


def test_peft_folders_go_in_and_out_byte_for_byte(place, tmp_path):
    write_peft(expert("past", 4), tmp_path / "past", metadata={"made": "elsewhere"})
    config = tmp_path / "past/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_dropout": 0.0', '"lora_dropout": 0.1'))
    library = place.begin()
    info = library.import_peft(tmp_path / "past", task="t")
    assert info.name == "past" and info.digest == expert("past", 4).digest
    place.open().export_peft("past", tmp_path / "out")
    for file in ("adapter_config.json", WEIGHTS):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "past" / file).read_bytes()
    assert same(read_peft(tmp_path / "out", "past"), expert("past", 4))
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors missing"):
        (tmp_path / "out" / WEIGHTS).unlink()
        library.import_peft(tmp_path / "out")
    with pytest.raises(ValueError, match=r"'LORA'"):
        config.write_text('{"peft_type": "IA3"}')
        library.import_peft(tmp_path / "past", "other")
    assert list(library) == ["past"]
