"""What is no LoRA file of a Stable Diffusion, and writes that fail."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file

from dreambooth.lora_files import read_lora, write_lora
from mole_vl import Expert, Factors
from tests.dreambooth.loras import ATTENTION, PLACES, kohya_pair, one_layer

KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
DIFFUSERS = "unet.mid_block.attentions.0.proj_in"
ONES = torch.ones(2, 2)
PAIR = kohya_pair(KOHYA, ONES, ONES)
PEFT_PAIR = {f"{DIFFUSERS}.lora_A.weight": ONES, f"{DIFFUSERS}.lora_B.weight": ONES}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is empty"),
        ({"model.weight": ONES}, "the key 'model.weight' is not used; expected LoRA factors"),
        ({**PAIR, f"{KOHYA}.dora_scale": ONES}, f"'{KOHYA}.dora_scale' is of DoRA"),
        ({f"{KOHYA}.hada_w1_a": ONES}, f"'{KOHYA}.hada_w1_a' is of LoHa"),
        ({f"{KOHYA}.lokr_w1": ONES}, "is of LoKr"),
        ({f"{KOHYA}.oft_blocks": ONES}, "is of OFT"),
        ({**PAIR, f"{KOHYA}.diff": ONES}, "is of a full difference"),
        ({**PEFT_PAIR, f"{DIFFUSERS}.lora_magnitude_vector": ONES}, "is of DoRA"),
        ({**PAIR, f"{KOHYA}.scalar": ONES}, f"the key '{KOHYA}.scalar' is not used"),
        ({**PAIR, **PEFT_PAIR}, f"the key '{DIFFUSERS}.lora_A.weight' is not used"),
        ({**PAIR, "lora_te3_x.alpha": ONES}, "the key 'lora_te3_x.alpha' is not used"),
        ({f"{KOHYA}.lora_down.weight": ONES}, "proj_in has A alone, expected both factors"),
        ({f"{DIFFUSERS}.lora_B.weight": ONES}, "proj_in has B alone, expected both factors"),
        ({f"{KOHYA}.alpha": ONES}, "proj_in has alpha alone"),
        ({**PAIR, f"{KOHYA}.alpha": ONES}, r"has the alpha \[\[1.0, 1.0\]"),
        ({**PAIR, f"{KOHYA}.alpha": torch.tensor(float("inf"))}, "has the alpha inf"),
        ({**PAIR, f"{KOHYA}.lora_up.weight": torch.ones(2, 3)}, r"shapes \(2, 2\) and \(2, 3\)"),
        ({**PAIR, f"{KOHYA}.lora_mid.weight": torch.ones(2, 2)}, r"lora_mid of shape \(2, 2\)"),
        ({**PAIR, f"{KOHYA}.lora_up.weight": ONES.int()}, "factor B of torch.int32"),
        ({**PAIR, f"{KOHYA}.lora_up.weight": ONES / 0}, "factor b of mid_block.*NaN or infinite"),
        ({**PEFT_PAIR, f"{DIFFUSERS}.lora_B.bias": ONES}, "lora_B.bias' is not used"),
        ({"transformer.x.lora_A.weight": ONES}, "the key 'transformer.x.lora_A.weight'"),
        (kohya_pair("lora_unet_double_blocks_0_img_attn_qkv", ONES, ONES), "names no layer of a"),
        (kohya_pair("lora_unet_output_blocks", ONES, ONES), "names no layer of a Stable"),
        (kohya_pair("lora_te_model_resblocks_0", ONES, ONES), "Diffusion's text_encoder"),
        (
            kohya_pair("lora_te_text_projection", ONES, ONES)
            | kohya_pair("lora_te1_text_projection", ONES, ONES),
            "names text_encoder's text_projection a second time",
        ),
        (
            {**PEFT_PAIR, f"{DIFFUSERS}.lora.down.weight": ONES},
            "names unet's mid_block.attentions.0.proj_in a second time",
        ),
        (kohya_pair("lora_te_text_model_encoder_layers_0_self_attn_out_proj", ONES * 0, ONES * 0),
         "changes no layer"),
    ],
)  # fmt: skip
def test_files_beyond_plain_lora_are_refused_with_file_and_key(tmp_path, tensors, message):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/a.safetensors.*{message}"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "lora_adapter_metadata is no JSON"),
        ("[]", "lora_adapter_metadata is no table"),
        ('{"unet.peft_type": "LOHA"}', "unet's lora_adapter_metadata: peft_type is 'LOHA'"),
        (
            '{"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 1, "unet.use_dora": true}',
            "use_dora = True is not supported",
        ),
        ('{"unet.peft_type": "LORA", "unet.r": 3, "unet.lora_alpha": 1}', "expected rank 3"),
    ],
)
def test_configs_in_the_header_are_checked(tmp_path, config, message):
    file = tmp_path / "a.safetensors"
    tensors = {key: tensor.clone() for key, tensor in PEFT_PAIR.items()}
    save_file(tensors, file, metadata={LORA_ADAPTER_METADATA_KEY: config})
    with pytest.raises(ValueError, match=f"a.safetensors.*{message}"):
        read_lora(file)
    settings = '{"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 1}'
    tensors[f"{DIFFUSERS}.alpha"] = torch.tensor(1.0)
    save_file(tensors, file, metadata={LORA_ADAPTER_METADATA_KEY: settings})
    with pytest.raises(ValueError, match="alphas both as keys and in lora_adapter_metadata"):
        read_lora(file)


def test_damaged_files_and_pickles_are_named(tmp_path):
    file = tmp_path / "dog.safetensors"
    write_lora(one_layer(), file, "kohya")
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], b"\x10" * 50):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"dog.safetensors is damaged or no safetensors file"):
            read_lora(file)
    for suffix in ("bin", "pt", "ckpt"):
        with pytest.raises(ValueError, match=f"dog.{suffix} is a pickle, which can run code"):
            read_lora(tmp_path / f"dog.{suffix}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_lora_weights.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_lora_weights.bin is a pickle"):
        read_lora(tmp_path / "old")
    with pytest.raises(FileNotFoundError, match=r"cat.safetensors is missing"):
        read_lora(tmp_path / "cat.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "lycoris"}, "form is 'lycoris', expected one of peft, diffusers, kohya"),
        ({"experts": {}}, "no experts"),
        ({"experts": {"vae": None}}, "component is 'vae', expected one of unet"),
        ({"path": "dog"}, "dog is not .safetensors"),
        ({"form": "peft"}, "dog.safetensors is a file, expected a folder"),
        ({"metadata": {"format": "np"}}, "metadata holds 'format'"),
        ({"metadata": {"steps": 3}}, "metadata 'steps' is 3, expected text"),
        ({"dtype": torch.float16}, "as torch.float16: factor b of .* holds NaN or infinite"),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, changes, message):
    path = f"{ATTENTION}.attn1.to_q"
    good = one_layer(path)
    wide = Factors(good["unet"].layers[path].a, good["unet"].layers[path].b * 1e8, 1.0)
    file = tmp_path / "dog.safetensors"
    write_lora(good, file, "kohya")
    before = file.read_bytes()
    asked = {"experts": {"unet": Expert("dog", {path: wide})}, "path": file, "form": "kohya"}
    asked |= changes
    asked["path"] = tmp_path / asked["path"]
    with pytest.raises(ValueError, match=message):
        write_lora(**asked)
    assert [child.name for child in tmp_path.iterdir()] == ["dog.safetensors"]
    assert file.read_bytes() == before


def test_a_fault_in_the_midst_of_a_write_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no space")

    write = Path.write_bytes
    monkeypatch.setattr("dreambooth.lora_files.save_file", fails)
    monkeypatch.setattr(
        Path, "write_bytes", lambda file, b: fails() if "safe" in file.suffix else write(file, b)
    )
    for form, place in PLACES.items():
        with pytest.raises(OSError, match="no space"):
            write_lora(one_layer(), tmp_path / place, form)
        assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    write_lora(one_layer(), tmp_path / "dog", "peft")
    write_lora(one_layer(), tmp_path / "dog", "peft")
    (tmp_path / "dog" / "letters").mkdir()
    with pytest.raises(ValueError, match="dog holds letters, which is no part of a LoRA"):
        write_lora(one_layer(), tmp_path / "dog", "peft")
    odd = Expert("dog", {"conv_in.my_layer": Factors(ONES, ONES, 1.0)})
    with pytest.raises(
        ValueError, match=r"names no layer of a Stable Diffusion's unet|no name for"
    ):
        write_lora({"unet": odd}, tmp_path / "odd.safetensors", "kohya")
    assert not (tmp_path / "odd.safetensors").exists()


def test_folding_beyond_16_bits_is_refused(tmp_path):
    half = torch.full((2, 2), 6e4, dtype=torch.float16)
    path = f"{ATTENTION}.attn1.to_"
    layers = {f"{path}q": Factors(half, half, 1.0), f"{path}k": Factors(half, half, 2.0)}
    with pytest.raises(ValueError, match=r"factor b of .* NaN or infinite"):
        write_lora({"unet": Expert("dog", layers)}, tmp_path / "dog.safetensors", "kohya")
