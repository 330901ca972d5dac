import json
from copy import deepcopy

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from mole_vl import mix, read_components, read_peft, write_peft
from mole_vl.gates import Sum
from tests.toys import Toy, inputs, three

CONFIGS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 7,
        "rank_pattern": {"blocks.0.attention.q": 5, "k": 1},
        "alpha_pattern": {r"blocks.1.attention.\w": 11, "ff.2": 3},
    },
}


def peft_folder(path, **config):
    """A folder written by peft itself, with random factors, and its model."""
    model = Toy()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    lora = peft.LoraConfig(target_modules=["q", "k", "ff.0", "ff.2"], **config)
    wrapped = peft.get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(path)
    twin = Toy()
    twin.load_state_dict(base)
    return wrapped, twin


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_single_expert_equals_peft(tmp_path, config):
    wrapped, model = peft_folder(tmp_path / "ann", **config)
    mix(model, [read_peft(tmp_path / "ann")], gate=Sum(), site="matrix")
    torch.testing.assert_close(model(*inputs()), wrapped(*inputs()))


# Names, paths and expressions that several layers match, or one in several ways. peft takes the
# first that matches, and sorts them where it saves.
PATTERNS = st.sampled_from(
    ["q", "k", "ff.0", r"ff\.\d", "attention.q", r"blocks.1.attention.\w", "blocks.0.attention.k",
     r".*\.2", r"blocks\.[01]\.ff.2", "^blocks.0.ff.0"]
)  # fmt: skip


def patterns(values):
    return st.dictionaries(PATTERNS, values, max_size=4).map(lambda d: dict(sorted(d.items())))


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    config=st.fixed_dictionaries(
        {
            "r": st.integers(1, 6),
            "lora_alpha": st.integers(1, 20),
            "rank_pattern": patterns(st.integers(1, 7)),
            "alpha_pattern": patterns(st.integers(1, 20)),
            "use_rslora": st.booleans(),
        }
    )
)
def test_any_patterns_are_read_as_peft_reads_them(tmp_path, config):
    torch.manual_seed(0)
    _, model = peft_folder(tmp_path / "ann", **config)
    loaded = peft.PeftModel.from_pretrained(deepcopy(model), tmp_path / "ann")
    expert = read_peft(tmp_path / "ann")
    layers = {
        path: module for path, module in loaded.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }  # fmt: skip
    assert expert.layers.keys() == layers.keys()
    for path, module in layers.items():
        found = expert.layers[path]
        assert (found.rank, found.scale) == (module.r["default"], module.scaling["default"])
    mix(model.double(), [expert], gate=Sum(), site="matrix")
    x, context = (part.double() for part in inputs())
    expected = loaded.double()(x, context)
    assert (model(x, context) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_is_read_by_peft_and_by_us(tmp_path, config):
    wrapped, model = peft_folder(tmp_path / "ann", **config)
    expert = read_peft(tmp_path / "ann")
    write_peft(expert, tmp_path / "bob")
    again = read_peft(tmp_path / "bob", name="ann")
    assert again.digest == expert.digest
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "bob")
    torch.testing.assert_close(loaded(*inputs()), wrapped(*inputs()))


def test_an_expert_of_mixed_ranks_and_scales_survives_a_write(tmp_path):
    model = Toy()
    for expert in three(model):
        write_peft(expert, tmp_path / expert.name)
        again = read_peft(tmp_path / expert.name)
        assert again.layers.keys() == expert.layers.keys()
        for path, factors in expert.layers.items():
            torch.testing.assert_close(again.layers[path].delta(), factors.delta())


def test_components_by_folder(tmp_path):
    peft_folder(tmp_path / "dog" / "unet", r=2)
    peft_folder(tmp_path / "dog" / "text_encoder", r=3)
    parts = read_components(tmp_path / "dog")
    assert {key: part.name for key, part in parts.items()} == {"unet": "dog", "text_encoder": "dog"}
    assert parts["text_encoder"].layers["blocks.0.attention.q"].rank == 3
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json in it or in its folders"):
        read_components(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"by component \(text_encoder, unet\): call read_components"
    ):
        read_peft(tmp_path / "dog")


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "is a DoRA's by its config and has no lora_magnitude_vector"),
        (
            {"lora_bias": True, "modules_to_save": ["head"]},
            "modules_to_save.*lora_bias|lora_bias.*modules_to_save",
        ),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"some_new_field": 3}, "some_new_field = 3 is not supported"),
        ({"r": 5}, "expected rank 5"),
        ({"lora_alpha": None}, "lora_alpha = None, expected a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan, expected a positive number"),
        ({"r": True}, "r = True, expected a positive number"),
        ({"rank_pattern": ["q"]}, r"rank_pattern = \['q'\], expected numbers by ends of paths"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern\['\('\] is no pattern: missing \)"),
        ({"rank_pattern": {"q": "2"}}, r"rank_pattern\['q'\] = '2', expected a positive number"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] = -1, expected a positive number"),
        ({"bias": "all"}, "bias = 'all', expected 'none': train the LoRA without biases"),
    ],
)
def test_configs_beyond_this_arithmetic_are_refused_by_name(tmp_path, changes, message):
    peft_folder(tmp_path / "ann", r=2)
    edited(tmp_path / "ann", **changes)
    with pytest.raises(ValueError, match=message):
        read_peft(tmp_path / "ann")


def test_bad_files_are_named(tmp_path):
    folder = tmp_path / "ann"
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        read_peft(folder)
    peft_folder(folder, r=2)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.blocks.0.attention.q.lora_B.weight"
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, weights)
    with pytest.raises(ValueError, match=r"factor b of blocks.0.attention.q holds NaN"):
        read_peft(folder)
    save_file({k: v for k, v in tensors.items() if k != key}, weights)
    with pytest.raises(ValueError, match=r"blocks.0.attention.q has lora_A alone"):
        read_peft(folder)
    save_file({**tensors, "base_model.model.q.lora_embedding_A": torch.ones(2, 2)}, weights)
    with pytest.raises(
        ValueError, match=r"'base_model.model.q.lora_embedding_A' is no LoRA factor"
    ):
        read_peft(folder)
    weights.write_bytes(b"\x10" * 50)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        read_peft(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_peft(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_in_a_files_place_is_no_file(tmp_path, name):
    peft_folder(tmp_path / "ann", r=2)
    (tmp_path / "ann" / name).unlink()
    (tmp_path / "ann" / name).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        read_peft(tmp_path / "ann")
