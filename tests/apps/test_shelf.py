"""The LoRAs that are there for everybody."""

from pathlib import Path

import pytest
import torch

from apps.shelf import Shelf
from dreambooth.lora_files import read_lora, write_lora


def test_a_world_gives_order_words_and_the_first_choice(tmp_path):
    shelf = Shelf(Path("worlds/emoji/loras"), tmp_path, {})
    names = list(shelf)
    assert len(names) == 19 and names[0] == "panda" and names[-1] == "twemoji"
    assert shelf.first_choice() == ["panda", "retro"]
    assert shelf["panda"].words.prompt == "a <v1> mammal"


def test_a_file_of_kohyas_becomes_a_peft_folder_with_its_triggers(page, tmp_path):
    found = read_lora(page.shelf["owl"].folder)
    file = tmp_path / "more" / "mug.safetensors"
    write_lora(found.experts, file, "kohya", metadata={"modelspec.trigger_phrase": "sks mug"})
    (tmp_path / "more" / ".hidden.safetensors").write_text("no LoRA")
    shelf = Shelf(tmp_path / "more", tmp_path / "made", page.studio.unet_config)
    assert list(shelf) == shelf.first_choice() == ["mug"]
    mug = shelf["mug"]
    assert mug.words.prompt == "sks mug" and (mug.folder / "unet").is_dir()
    expected, got = read_lora(file).experts["unet"], read_lora(mug.folder).experts["unet"]
    assert got.name == "mug" and got.digest == expected.digest
    for path, factors in found.experts["unet"].layers.items():
        torch.testing.assert_close(got.layers[path].delta(), factors.delta())


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"loras: .*nowhere is no folder, expected one of"):
        Shelf(tmp_path / "nowhere", tmp_path, {})
