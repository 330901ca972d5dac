"""What a person brings is checked, kept apart, and harmless."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apps import uploads
from apps.uploads import find_lora, take_gates, take_lora, uploaded
from dreambooth.base import Base
from dreambooth.lora_files import read_lora, write_lora
from mole_vl import Expert, Factors, save_gates
from tests.dreambooth.test_clip_task import experts
from tests.dreambooth.toys import write_base


def kohya(page, file):
    write_lora(read_lora(page.shelf["owl"].folder).experts, file, "kohya")
    return file


def test_a_lora_joins_its_own_session_under_a_free_name(page, tmp_path):
    lora = take_lora(page.studio, page.session, kohya(page, tmp_path / "owl.safetensors"), ["owl"])
    assert lora.name == "owl-2" and page.session.loras == {"owl-2": lora}
    assert lora.folder.is_relative_to(page.session.folder)
    odd = take_lora(page.studio, page.session, kohya(page, tmp_path / "my <b>.safetensors"), [])
    assert odd.name == "my-b"


def test_types_and_sizes_are_checked(tmp_path):
    file = tmp_path / "lora.pt"
    file.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"lora.pt is of another type, expected .safetensors"):
        uploaded(file, 2**20)
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(3 * 2**20))
    with pytest.raises(ValueError, match=r"large.safetensors has 3 MiB, expected at most 1"):
        uploaded(large, 2**20)
    assert uploaded(large, 4 * 2**20) == large


def test_a_damaged_file_and_a_lora_of_another_base_leave_nothing(page, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        take_lora(page.studio, page.session, damaged, [])
    wide = Expert("wide", {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": Factors(
        torch.ones(2, 320), torch.ones(320, 2), 1.0
    )})  # fmt: skip
    write_lora({"unet": wide}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="wide"):
        take_lora(page.studio, page.session, tmp_path / "wide.safetensors", [])
    assert not page.session.loras and not list(page.session.folder.rglob("*.safetensors"))


def test_a_place_is_a_path_or_a_hub_id(page, tmp_path, monkeypatch):
    file = kohya(page, tmp_path / "hub" / "mug.safetensors")
    asked = []

    def snapshot(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr(uploads, "snapshot_download", snapshot)
    assert find_lora(f" {file} ") == file and not asked
    assert find_lora("ann/mugs") == find_lora("ann/mugs/mug.safetensors") == file
    assert asked == [("ann/mugs", ["*.safetensors", "*.json"])] * 2
    kohya(page, tmp_path / "hub" / "cup.safetensors")
    with pytest.raises(
        ValueError, match=r"several files \(cup.safetensors, mug.safetensors\): write ann/mugs/FILE"
    ):
        find_lora("ann/mugs")
    with pytest.raises(FileNotFoundError, match="neither a folder, a file, nor the form of a Hub"):
        find_lora("ann/../../etc")
    for nowhere in ("~nobody-of-this-name/lora", "a" * 5000):
        with pytest.raises(FileNotFoundError, match="neither a folder, a file, nor the form"):
            find_lora(nowhere)

    def unreachable(repository, allow_patterns):
        raise ConnectionError("no route")

    monkeypatch.setattr(uploads, "snapshot_download", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"ann/cups is no folder here, .*gave none: no route"
    ):
        find_lora("ann/cups")
    with pytest.raises(ValueError, match="place of the LoRA is empty"):
        find_lora("  ")


def test_a_gate_file_serves_the_loras_that_it_names(page, tmp_path):
    with page.studio.holding(page.loras) as pipe:
        save_gates(pipe.mixtures["unet"], tmp_path / "any name.safetensors")
    assert brought(page, tmp_path / "any name.safetensors") == ("owl", "ink")
    with page.studio.holding(page.loras, page.session.gates_of(frozenset({"owl", "ink"}))):
        pass
    with pytest.raises(ValueError, match="no gate file"):
        brought(page, kohya(page, tmp_path / "lora.safetensors"))


def brought(page, file):
    return take_gates(page.studio, page.session, page.shelf, file)


def test_gates_that_nobody_here_can_draw_with_are_refused_and_leave_those_before(page, tmp_path):
    for name in ("first", "wide"):
        with page.studio.holding(page.loras) as pipe:
            save_gates(pipe.mixtures["unet"], tmp_path / f"{name}.safetensors")
    brought(page, tmp_path / "first.safetensors")
    before = page.session.gates_of(frozenset({"owl", "ink"}))
    tensors = load_file(tmp_path / "wide.safetensors")
    with safe_open(tmp_path / "wide.safetensors", framework="pt") as opened:
        header = opened.metadata()
    wide = {key: torch.zeros(7) for key in tensors}
    save_file(wide, tmp_path / "wide.safetensors", metadata=header)
    with pytest.raises(ValueError, match="does not fit this model's sites"):
        brought(page, tmp_path / "wide.safetensors")
    slots = {"mole_vl": header["mole_vl"].replace('"owl"', '"subject"')}
    save_file(tensors, tmp_path / "slots.safetensors", metadata=slots)
    with pytest.raises(ValueError, match="weigh subject, ink, and there is no LoRA subject on"):
        brought(page, tmp_path / "slots.safetensors")
    assert page.session.gates_of(frozenset({"owl", "ink"})) == before
    assert [file.parent for file in page.session.folder.rglob("unet.safetensors")] == [before]


def test_gates_for_other_factors_are_refused(page, tmp_path):
    torch.manual_seed(8)
    other = Base.load(write_base(tmp_path / "again", "v_prediction"))
    experts(other.unet, tmp_path / "again")
    loras = [
        take_lora(page.studio, page.session, Path(tmp_path / "again" / name), [])
        for name in ("owl", "ink")
    ]
    with page.studio.holding(loras) as pipe:
        save_gates(pipe.mixtures["unet"], tmp_path / "gates.safetensors")
    brought(page, tmp_path / "gates.safetensors")
    shipped = (page.shelf["owl"], page.shelf["ink"])
    with (
        pytest.raises(ValueError, match="trained with other factors of owl, ink"),
        page.studio.holding(shipped, page.session.gates_of(frozenset({"owl", "ink"}))),
    ):
        pass
    page.session.loras.clear()
    with pytest.raises(ValueError, match="trained with other factors of owl, ink"):
        brought(page, tmp_path / "gates.safetensors")
