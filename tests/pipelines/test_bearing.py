"""Loading experts and gates: all of it, or an error and the pipeline as it was."""

import re

import pytest
import torch

from mole_vl import Expert, Factors, save_gates, write_peft
from mole_vl.gates import Average, Free, MoLE, Sum
from tests.pipelines.toys import (
    READING,
    TEXT,
    differ,
    draw,
    folded,
    lora,
    loras,
    mixed,
    parts_of,
    randomise,
    same,
    sd1,
    sdxl,
)


def write(folder, parts):
    for part, expert in parts.items():
        write_peft(expert, folder / part)
    return folder


def state(pipe):
    """All that a failed loading might have touched."""
    return [
        (part, [(n, type(m).__name__) for n, m in getattr(pipe, part).named_modules()])
        for part in parts_of(pipe)
    ]


@pytest.mark.parametrize("base", [sd1, sdxl])
def test_folders_of_parts_under_own_and_given_names(base, tmp_path):
    pipe = base()
    experts = loras(pipe, parts_of(pipe))
    plain = folded(base, experts, {"ann": 0.5, "bob": 0.5})
    folders = [write(tmp_path / e["unet"].name, e) for e in experts]
    pipe.load_experts(folders)
    assert pipe.experts == ("ann", "bob")
    assert tuple(pipe.mixtures) == parts_of(pipe)
    found = draw(pipe)
    same(found, draw(plain))
    pipe.unload_experts()
    pipe.load_experts({"x": folders[0], "y": str(folders[1])})
    assert pipe.experts == ("x", "y")
    assert torch.equal(draw(pipe), found)


def test_a_plain_folder_is_a_unets(tmp_path):
    pipe = sd1()
    write_peft(lora(pipe.unet, "ann", 1), tmp_path / "ann")
    pipe.load_experts([tmp_path / "ann"])
    assert tuple(pipe.mixtures) == ("unet",)


def test_text_paths_fit_with_and_without_the_older_prefix():
    pipe = sdxl()
    plain = folded(sdxl, loras(pipe, parts_of(pipe)), {"ann": 0.5, "bob": 0.5})
    experts = loras(pipe, parts_of(pipe))
    for parts in experts:
        one, two = parts["text_encoder"], parts["text_encoder_2"]
        parts["text_encoder"] = one.renamed({p: f"text_model.{p}" for p in one.layers})
        parts["text_encoder_2"] = two.renamed(
            {p: p.removeprefix("text_model.") for p in two.layers}
        )
    pipe.load_experts(experts)
    same(draw(pipe), draw(plain))


def test_only_some_parts_are_mixed_where_that_is_asked():
    pipe = sd1()
    pipe.load_experts(loras(pipe, TEXT), parts=["unet"])
    assert tuple(pipe.mixtures) == ("unet",)


def eve(pipe):
    return {"unet": Expert("eve", {"nowhere": Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0)})}


@pytest.mark.parametrize(
    ("experts", "settings", "message"),
    [
        (lambda p: [], {}, "expected at least one expert, got none"),
        (lambda p: [*loras(p), eve(p)], {}, "'eve' from memory matches no layer"),
        (lambda p: [*loras(p, TEXT), {"text_encoder": eve(p)["unet"]}], {}, "matches no layer"),
        (lambda p: loras(p, names=("ann", "ann")), {}, "two experts have the name ann"),
        (
            lambda p: [{**loras(p)[0], "text_encoder_2": loras(p)[0]["unet"]}],
            {},
            "expert 'ann' changes text_encoder_2, which this pipeline lacks (it has unet, "
            "text_encoder); `parts` says what to mix",
        ),
        (lambda p: loras(p), {"parts": ["vae"]}, "parts names vae, which this pipeline lacks"),
        (lambda p: loras(p), {"parts": ["text_encoder"]}, "changes unet alone, none of text_en"),
        (lambda p: loras(p), {"site": "preview"}, "a UNet's input changes at every step"),
        (lambda p: loras(p, TEXT), {"site": "network", "after": 3}, "only 2 blocks carry experts"),
    ],
)
def test_experts_that_do_not_fit_leave_the_pipeline_alone(experts, settings, message):
    pipe = sd1()
    expected, before = draw(pipe), state(pipe)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.load_experts(experts(pipe), **settings)
    assert state(pipe) == before
    assert pipe.experts == ()
    assert torch.equal(draw(pipe), expected)


def test_loading_twice_and_unloading_nothing():
    pipe = sd1()
    with pytest.raises(RuntimeError, match="no experts are loaded"):
        pipe.unload_experts()
    with pytest.raises(RuntimeError, match=r"load_gates: call load_experts\(\) first"):
        pipe.load_gates("anywhere")
    experts = loras(pipe)
    pipe.load_experts(experts)
    with pytest.raises(RuntimeError, match=r"loaded already \(ann, bob\): call unload_experts"):
        pipe.load_experts(experts)


def test_unloading_gives_the_base_back_bit_for_bit():
    pipe = sd1()
    before, structure = draw(pipe), state(pipe)
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    pipe.load_experts(loras(pipe, TEXT), gate=READING)
    draw(randomise(pipe))
    pipe.unload_experts()
    assert state(pipe) == structure
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    assert torch.equal(draw(pipe), before)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def gates_of(pipe, folder):
    for part, mixture in pipe.mixtures.items():
        save_gates(mixture, folder / f"{part}.safetensors")
    return folder


def test_gates_come_with_site_and_order_and_nothing_is_retyped(tmp_path):
    trained = mixed(parts=TEXT, site="layer")
    expected = draw(trained)
    folder = gates_of(trained, tmp_path / "gates")
    pipe = sd1()
    pipe.load_experts(loras(pipe, TEXT)[::-1])
    differ(draw(pipe), expected)
    pipe.load_gates(folder)
    same(draw(pipe), expected)
    assert pipe.mixtures["unet"].names == ("ann", "bob")
    assert pipe.experts == ("bob", "ann")
    weights = {"ann": 1.0, "bob": 0.25}
    same(draw(pipe, weights=[0.25, 1.0]), draw(pipe, weights=weights))
    same(draw(trained, weights=weights), draw(pipe, weights=weights))


def test_a_part_without_gates_keeps_its_own(tmp_path):
    trained = mixed(parts=TEXT)
    folder = gates_of(trained, tmp_path / "gates")
    (folder / "text_encoder.safetensors").unlink()
    pipe = sd1()
    pipe.load_experts(loras(pipe, TEXT), gate=Sum())
    pipe.load_gates(folder)
    assert pipe.mixtures["text_encoder"].spec == Sum()
    assert pipe.mixtures["unet"].spec == READING


def wrong_experts(folder):
    pipe = sd1()
    pipe.load_experts(loras(pipe, TEXT, names=("ann", "eve")))
    return gates_of(pipe, folder)


def changed_experts(folder):
    pipe = sd1()
    ann, _ = loras(pipe, TEXT)
    other = {p: lora(getattr(pipe, p), "bob", 99) for p in TEXT}
    pipe.load_experts([ann, other])
    return gates_of(pipe, folder)


def text_alone_is_wrong(folder):
    pipe = mixed(parts=TEXT)
    gates_of(pipe, folder)
    (folder / "text_encoder.safetensors").write_bytes((folder / "unet.safetensors").read_bytes())
    return folder


def of_another_part(folder):
    gates_of(mixed(parts=TEXT), folder)
    (folder / "unet.safetensors").rename(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (wrong_experts, "gates the experts ann, eve; missing: eve"),
        (changed_experts, "was trained with other factors of bob"),
        (text_alone_is_wrong, "was trained with other factors of ann, bob"),
        (of_another_part, "has gates of model; the loaded experts change unet, text_encoder"),
    ],
)
def test_gates_that_do_not_fit_leave_the_pipeline_alone(gates, message, tmp_path):
    folder = gates(tmp_path / "gates")
    pipe = mixed(parts=TEXT, gate=MoLE(score=Free()))
    expected, before, mixtures = draw(pipe), state(pipe), dict(pipe.mixtures)
    with pytest.raises(ValueError, match=message):
        pipe.load_gates(folder)
    assert state(pipe) == before
    assert {part: id(m) for part, m in pipe.mixtures.items()} == {
        part: id(m) for part, m in mixtures.items()
    }
    assert torch.equal(draw(pipe), expected)
    with pytest.raises(FileNotFoundError, match="no gate files"):
        pipe.load_gates(tmp_path / "nowhere")
    pipe.unload_experts()
    assert torch.equal(draw(pipe), draw(sd1()))


def test_changed_factors_are_taken_if_that_is_said(tmp_path):
    pipe = mixed(parts=TEXT)
    pipe.load_gates(changed_experts(tmp_path / "gates"), allow_changed=True)
    assert pipe.mixtures["unet"].spec == Average()


def test_a_unet_mixed_by_hand_draws_too():
    trained = mixed()
    pipe = sd1()
    pipe.unet = trained.unet
    assert pipe.experts == ("ann", "bob")
    same(draw(pipe, masked=["ann"]), draw(trained, masked=["ann"]))
    with pytest.raises(RuntimeError, match="those mixed in by hand have no files"):
        pipe.load_gates("anywhere")
