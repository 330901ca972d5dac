"""One folder for all, and one ordinary LoRA for the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from mole_vl.arms import together
from mole_vl.gates import Sum
from pipelines import MoLEStableDiffusionPipeline
from tests.pipelines.toys import (
    BASES,
    PLAIN,
    TEXT,
    differ,
    draw,
    folded,
    loras,
    mixed,
    parts_of,
    quiet,
    same,
    sd1,
    sdxl,
)

GIVEN = {"ann": 0.7, "bob": -0.4}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_one_folder_gives_the_same_pictures(base, tmp_path):
    pipe = mixed(base, parts_of(base()))
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    assert torch.equal(draw(pipe), expected)
    again = quiet(type(pipe).from_pretrained(tmp_path / "pipe"))
    assert again.experts == pipe.experts
    same(draw(again), expected)
    assert {p: m.digests for p, m in again.mixtures.items()} == {
        p: m.digests for p, m in pipe.mixtures.items()
    }


@pytest.mark.parametrize("base", [sd1, sdxl])
def test_the_base_in_it_is_the_bases_own(base, tmp_path):
    pipe = base()
    pipe.save_pretrained(tmp_path / "base")
    mixed(base, parts_of(pipe)).save_pretrained(tmp_path / "mixed")
    for part in parts_of(pipe):
        one, two = (
            load_file(next((tmp_path / kind / part).glob("*.safetensors")))
            for kind in ("base", "mixed")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    plain = quiet(PLAIN[type(pipe)].from_pretrained(tmp_path / "mixed"))
    same(draw(plain), draw(pipe))
    any_tool = quiet(DiffusionPipeline.from_pretrained(tmp_path / "mixed"))
    assert type(any_tool) is PLAIN[type(pipe)]


def test_a_base_saved_in_half_is_read_in_one_precision(tmp_path):
    pipe = mixed(parts=TEXT)
    expected = draw(pipe)
    pipe.to(torch.float16, silence_dtype_warnings=True)
    pipe.save_pretrained(tmp_path / "pipe")
    again = quiet(MoLEStableDiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    assert {p.dtype for m in (again.unet, again.text_encoder) for p in m.parameters()} == {
        torch.float32
    }
    # What half precision rounds is the base alone: experts are as they were.
    assert again.mixtures["unet"].digests == pipe.mixtures["unet"].digests
    torch.testing.assert_close(draw(again), expected, rtol=0.1, atol=0.1)
    other = MoLEStableDiffusionPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.bfloat16)
    assert other.unet.dtype == other.text_encoder.dtype == torch.bfloat16
    assert draw(quiet(other)).dtype == torch.bfloat16


def test_a_plain_pipeline_saved_over_a_mixed_one_brings_no_experts_back(tmp_path):
    mixed().save_pretrained(tmp_path / "pipe")
    sd1().save_pretrained(tmp_path / "pipe")
    again = MoLEStableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert again.experts == ()


def test_factors_survive_whatever_their_scales(tmp_path):
    pipe = sd1()
    experts = loras(pipe)
    for index, parts in enumerate(experts):
        for path, factors in parts["unet"].layers.items():
            object.__setattr__(factors, "scale", (0.1 + index) / 3 + len(path) / 7)
    pipe.load_experts(experts)
    pipe.save_pretrained(tmp_path / "pipe")
    again = MoLEStableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert again.mixtures["unet"].digests == pipe.mixtures["unet"].digests


def test_what_cannot_be_saved_is_said(tmp_path):
    pipe = mixed()
    with pytest.raises(ValueError, match="push_to_hub would leave the experts out"):
        pipe.save_pretrained(tmp_path / "pipe", push_to_hub=True)
    by_hand = sd1()
    by_hand.unet = pipe.unet
    with pytest.raises(RuntimeError, match="save_pretrained: call load_experts"):
        by_hand.save_pretrained(tmp_path / "pipe")
    pipe.mixtures["unet"].bake(GIVEN)
    with pytest.raises(RuntimeError, match="baked"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
    pipe = mixed()
    pipe.save_pretrained(tmp_path / "pipe")
    index = tmp_path / "pipe/mixture/index.json"
    index.write_text(json.dumps({"format": "other", "experts": []}))
    with pytest.raises(ValueError, match="format is 'other'"):
        MoLEStableDiffusionPipeline.from_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("base", [sd1, sdxl])
def test_an_export_of_given_weights_draws_the_same_in_a_plain_pipeline(base, tmp_path):
    pipe = mixed(base, parts_of(base()))
    errors = pipe.export(tmp_path / "one", weights=GIVEN)
    assert tuple(errors) == parts_of(pipe)
    assert max(errors.values()) < 1e-5
    again = base()
    again.load_experts([tmp_path / "one"], gate=Sum())
    same(draw(again), draw(pipe, weights=GIVEN))


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_load_lora_weights_of_an_export_draws_the_same(tmp_path, base, form):
    """In a process of its own: peft's own warnings are not ours."""
    make = {"sd1": sd1, "sdxl": sdxl}[base]
    pipe = mixed(make, parts_of(make()))
    file = tmp_path / "one.safetensors"
    pipe.export(file, form=form, weights=GIVEN)
    torch.save(draw(pipe, weights=GIVEN), tmp_path / "expected.pt")
    kind = "StableDiffusionXLPipeline" if base == "sdxl" else "StableDiffusionPipeline"
    code = f"""
import torch
from diffusers import {kind}
from tests.pipelines.toys import draw, same, {base}
pipe = {base}({kind})
pipe.load_lora_weights("{file}")
same(draw(pipe), torch.load("{tmp_path}/expected.pt"))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_experts_are_loaded_from_files_of_every_form(tmp_path, form):
    pipe = mixed(parts=TEXT)
    file = tmp_path / ("one" if form == "peft" else "one.safetensors")
    pipe.export(file, form=form, weights=GIVEN)
    again = sd1()
    again.load_experts([file], gate=Sum())
    assert again.experts == ("one",)
    same(draw(again), draw(pipe, weights=GIVEN))


def test_an_export_of_recorded_weights_is_their_mean(tmp_path):
    pipe = mixed(parts=TEXT)
    with pipe.record() as weights:
        draw(pipe, strength=0.5)
    errors = pipe.export(tmp_path / "one", weights=weights)
    assert max(errors.values()) < 1e-5
    again = sd1()
    again.load_experts([tmp_path / "one"], gate=Sum())
    means = {part: weights.mean(part) for part in TEXT}
    with together([pipe.mixtures[part].pinned(means[part]) for part in TEXT]):
        same(draw(again), draw(pipe))
    differ(draw(again), draw(pipe))


def test_a_smaller_rank_says_what_it_misses(tmp_path):
    pipe = sd1()
    pipe.load_experts(loras(pipe), gate=Sum())
    errors = pipe.export(tmp_path / "one", 2)
    lost, whole = 0.0, 0.0
    again = sd1()
    again.load_experts([tmp_path / "one"], gate=Sum())
    for path, layer in pipe.mixtures["unet"].layers.items():
        full = layer.delta(torch.ones(2))
        left = again.mixtures["unet"].layers[path].delta(torch.ones(1)) - full
        lost, whole = lost + float(left.square().sum()), whole + float(full.square().sum())
    assert errors["unet"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert errors["unet"] > 0.05


def test_exports_that_stand_for_nothing_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"export: call load_experts\(\) first"):
        sd1().export(tmp_path / "one")
    pipe = mixed()
    with pytest.raises(ValueError, match="gates of unet read their input"):
        pipe.export(tmp_path / "one")
    with pytest.raises(ValueError, match="unknown expert 'eve'"):
        pipe.export(tmp_path / "one", weights={"eve": 1.0})
    with pytest.raises(ValueError, match="rank is 0"):
        pipe.export(tmp_path / "one", 0, weights=GIVEN)
    with pytest.raises(ValueError, match=r"rank is 1.5, expected a whole number"):
        pipe.export(tmp_path / "one", 1.5, weights=GIVEN)
    other = mixed(names=("ann", "eve"))
    with other.record() as recording:
        draw(other)
    with pytest.raises(ValueError, match="of unet is of the experts ann, eve, expected ann, bob"):
        pipe.export(tmp_path / "one", weights=recording)
    with pytest.raises(ValueError, match="nothing changes the base"):
        pipe.export(tmp_path / "one", weights={"ann": 0.0})
    assert not (tmp_path / "one").exists()


def test_what_is_not_of_a_mixture_is_not_replaced(tmp_path):
    pipe = mixed()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "mixture/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mixture holds notes.txt, which is no part of a mixture"):
        pipe.save_pretrained(tmp_path)
    assert (tmp_path / "mixture/notes.txt").read_text() == "mine"


def test_what_is_left_of_a_saved_mixture_is_no_plain_base(tmp_path):
    mixed().save_pretrained(tmp_path)
    index = tmp_path / "mixture/index.json"
    index.write_text("{")
    with pytest.raises(ValueError, match=r"mixture/index.json is no JSON"):
        MoLEStableDiffusionPipeline.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json is no file, expected the list"):
        MoLEStableDiffusionPipeline.from_pretrained(tmp_path)


def test_a_gate_file_in_place_of_its_folder_is_said(tmp_path):
    pipe = mixed()
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "mixture/gates/unet.safetensors"
    with pytest.raises(ValueError, match=r"unet.safetensors is a file, expected the gates' folder"):
        pipe.load_gates(file)


def test_a_part_whose_experts_are_at_zero_is_left_out(tmp_path):
    pipe = sd1()
    ann, bob = loras(pipe, TEXT)
    pipe.load_experts([{"unet": ann["unet"]}, bob])
    errors = pipe.export(tmp_path / "one", weights={"ann": 0.5})
    assert tuple(errors) == ("unet",)
    again = sd1()
    again.load_experts([tmp_path / "one"])
    same(draw(again), draw(folded(sd1, [{"unet": ann["unet"]}], {"ann": 0.5})))
