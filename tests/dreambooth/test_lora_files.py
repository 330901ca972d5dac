"""Our LoRA files against diffusers itself, in the three formats."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth.adapter import fitted_to
from dreambooth.lora_files import read_lora, write_lora
from mole_vl import Expert
from tests.dreambooth.loras import (
    ALPHAS,
    PLACES,
    SGM,
    TEXT,
    check_same,
    mixed,
    one_layer,
    picture,
    two_parts,
    xl_parts,
)
from tests.dreambooth.toys import tiny_pipeline, tiny_xl_pipeline

# The three forms


@pytest.mark.parametrize("form", PLACES)
def test_each_form_is_read_back_to_the_same_updates(tmp_path, form):
    experts = two_parts(tiny_pipeline(), alphas=ALPHAS)
    write_lora(experts, tmp_path / PLACES[form], form)
    again = read_lora(tmp_path / PLACES[form])
    assert (again.form, again.triggers) == (form, ())
    assert {part.name for part in again.experts.values()} == {"dog"}
    check_same(experts, again.experts)
    if form != "kohya":
        for component, expert in experts.items():
            fitted = again.experts[component].renamed({f"text_model.{p}": p for p in TEXT})
            assert fitted.digest == expert.digest


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("alphas", [(1.5,), ALPHAS], ids=["one alpha", "many alphas"])
def test_diffusers_makes_of_our_files_the_picture_that_our_mixture_makes(tmp_path, form, alphas):
    pipe = tiny_pipeline()
    write_lora(two_parts(pipe, alphas=alphas), tmp_path / "dog.safetensors", form)
    plain, ours = copy.deepcopy(pipe), copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog.safetensors"))
    expected = picture(plain)
    assert (expected - picture(pipe)).abs().max() > 0.05
    made = picture(mixed(ours, read_lora(tmp_path / "dog.safetensors")))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_is_loaded_by_diffusers_too(tmp_path):
    pipe = tiny_pipeline()
    experts = two_parts(pipe)
    write_lora(experts, tmp_path / "dog", "diffusers", metadata={"note": "of one dog"})
    again = read_lora(tmp_path / "dog")
    check_same(experts, again.experts)
    inside = read_lora(tmp_path / "dog" / "pytorch_lora_weights.safetensors")
    assert inside.experts["unet"].digest == again.experts["unet"].digest
    assert inside.experts["unet"].name == "dog"
    assert again.experts["unet"].name == "dog"
    with safe_open(tmp_path / "dog" / "pytorch_lora_weights.safetensors", "pt") as opened:
        assert opened.metadata()["note"] == "of one dog"
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog"))
    torch.testing.assert_close(picture(plain), picture(mixed(pipe, again)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", [TEXT[:1], (TEXT[1], TEXT[4])], ids=["q", "k and feed-forward"])
def test_a_text_encoder_without_out_proj_reaches_diffusers_in_kohyas_form(tmp_path, text):
    pipe = tiny_pipeline()
    experts = two_parts(pipe, text=text)
    write_lora(experts, tmp_path / "dog.safetensors", "kohya")
    again = read_lora(tmp_path / "dog.safetensors")
    check_same(experts, again.experts)
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog.safetensors"))
    torch.testing.assert_close(picture(plain), picture(mixed(pipe, again)), rtol=1e-4, atol=1e-4)


def test_a_type_of_16_bits_is_kept_to_its_precision(tmp_path):
    experts = two_parts(tiny_pipeline())
    for form, place in PLACES.items():
        file = tmp_path / form / place
        write_lora(experts, file, form, dtype=torch.float16)
        again = read_lora(file).experts
        assert {f.a.dtype for f in again["unet"].layers.values()} == {torch.float16}
        check_same(experts, again, rtol=0.01, atol=2e-3)


def test_the_base_is_kept(tmp_path):
    expert = Expert("dog", one_layer()["unet"].layers, base="some/base")
    for form, place in PLACES.items():
        write_lora({"unet": expert}, tmp_path / form / place, form)
        assert read_lora(tmp_path / form / place).experts["unet"].base == "some/base", form


# SDXL


def in_sgm_names(file):
    names = {f"lora_unet_{path.replace('.', '_')}": f"lora_unet_{sgm}" for sgm, path in SGM.items()}
    renamed = {}
    for key, tensor in load_file(file).items():
        name, _, part = key.partition(".")
        renamed[f"{names.get(name, name)}.{part}"] = tensor
    save_file(renamed, file)


def test_sdxl_in_sgm_names_is_read_as_diffusers_reads_it(tmp_path):
    pipe = tiny_xl_pipeline()
    # diffusers takes a text_projection's rank from the other layers': all have one.
    experts = xl_parts(pipe, alphas=(1.5,), ranks=(2,))
    file = tmp_path / "dog.safetensors"
    write_lora(experts, file, "kohya")
    assert {key.split("_")[1] for key in load_file(file)} == {"unet", "te1", "te2"}
    in_sgm_names(file)
    with pytest.raises(ValueError, match=r"is a name of the sgm UNet.*give `unet_config`"):
        read_lora(file)
    again = read_lora(file, unet_config=pipe.unet.config)
    check_same(experts, again.experts)
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(file))
    torch.testing.assert_close(picture(plain), picture(mixed(pipe, again)), rtol=1e-4, atol=1e-4)


def test_sdxl_in_diffusers_form_and_names(tmp_path):
    pipe = tiny_xl_pipeline()
    experts = xl_parts(pipe, alphas=ALPHAS)
    write_lora(experts, tmp_path / "dog.safetensors", "diffusers")
    again = read_lora(tmp_path / "dog.safetensors")
    check_same(experts, again.experts)
    plain = copy.deepcopy(pipe)
    plain.load_lora_weights(str(tmp_path / "dog.safetensors"))
    torch.testing.assert_close(picture(plain), picture(mixed(pipe, again)), rtol=1e-4, atol=1e-4)
    write_lora(experts, tmp_path / "cat.safetensors", "kohya")
    check_same(experts, read_lora(tmp_path / "cat.safetensors").experts)


# Paths


def test_text_encoders_paths_are_fitted_to_the_model_at_hand():
    pipe = tiny_xl_pipeline()
    experts = xl_parts(pipe)
    bare, full = experts["text_encoder"], experts["text_encoder_2"]
    assert fitted_to(bare, pipe.text_encoder) is bare
    assert fitted_to(full, pipe.text_encoder_2) is full
    there = bare.renamed({path: f"text_model.{path}" for path in bare.layers})
    assert fitted_to(there, pipe.text_encoder).digest == bare.digest
    back = full.renamed({path: path.removeprefix("text_model.") for path in full.layers})
    assert fitted_to(back, pipe.text_encoder_2).digest == full.digest
    assert fitted_to(experts["unet"], pipe.text_encoder) is experts["unet"]
