import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mole_vl import mix, mix_from, read_gates, save_gates
from mole_vl.gates import (
    Average,
    Constants,
    Free,
    Hidden,
    MoLE,
    Responses,
    ScaledSoftmax,
    Sigmoid,
    Sum,
)
from tests.toys import BLOCKS, SITES, Toy, expert, inputs, randomise, three

GATES = [
    MoLE(),
    MoLE(score=Responses(), normaliser=ScaledSoftmax(total=1.5)),
    MoLE(score=Free(), normaliser=Sigmoid(top=3.0)),
    Constants(weights={"ann": 0.5, "bob": 0.1, "cyd": 2.0}),
    Sum(),
    Average(),
]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_saved_and_loaded_gates_give_the_same_numbers_whatever_the_order_of_experts(
    tmp_path, gate, site
):
    model, twin = Toy(), Toy()
    twin.load_state_dict(model.state_dict())
    experts = three(model)
    mixture = mix(model, experts, gate=gate, **site, blocks=BLOCKS)
    randomise(mixture)
    save_gates(mixture, tmp_path / "gates.safetensors")
    again = mix_from(twin, experts[::-1], tmp_path / "gates.safetensors", blocks=BLOCKS)
    assert again.spec == gate
    assert again.names == mixture.names
    assert torch.equal(model(*inputs()), twin(*inputs()))


def test_experts_are_matched_by_name_and_by_factors(tmp_path):
    model = Toy()
    experts = three(model)
    path = tmp_path / "gates.safetensors"
    save_gates(mix(model, experts, gate=MoLE(), blocks=BLOCKS), path)
    base = Toy()
    before = str(base)
    other = expert("bob", base, ["blocks.0.attention.q", "blocks.0.attention.k"], [1, 4], seed=7)
    with pytest.raises(ValueError, match=r"missing: bob \(given: ann, cyd\)"):
        mix_from(base, [experts[0], experts[2]], path, blocks=BLOCKS)
    with pytest.raises(ValueError, match="no gate for dan"):
        mix_from(base, [*experts, expert("dan", base, ["inlet"], [1])], path, blocks=BLOCKS)
    with pytest.raises(ValueError, match="trained with other factors of bob"):
        mix_from(base, [experts[0], other, experts[2]], path, blocks=BLOCKS)
    assert str(base) == before
    mix_from(base, [experts[0], other, experts[2]], path, blocks=BLOCKS, allow_changed=True)


def test_gates_for_other_sites_are_refused_and_leave_the_base(tmp_path):
    model = Toy()
    path = tmp_path / "gates.safetensors"
    save_gates(mix(model, three(model), gate=MoLE(score=Hidden()), blocks=BLOCKS), path)
    tensors = load_file(path)
    with pytest.raises(ValueError, match="no 'mole_vl' entry"):
        save_file(tensors, tmp_path / "plain.safetensors")
        read_gates(tmp_path / "plain.safetensors")
    base = Toy()
    before = str(base)
    with pytest.raises(
        ValueError, match=r"does not fit this model's sites: at blocks.score.weight is missing"
    ):
        mix_from(base, three(base), path, blocks={"blocks": 6})
    assert str(base) == before


def test_damaged_and_missing_gate_files_are_one_clear_error(tmp_path):
    model = Toy()
    path = tmp_path / "gates.safetensors"
    with pytest.raises(FileNotFoundError, match="no such gate file"):
        read_gates(path)
    save_gates(mix(model, three(model), gate=MoLE(), blocks=BLOCKS), path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged or no safetensors"):
            read_gates(path)
    assert [p.name for p in tmp_path.iterdir()] == ["gates.safetensors"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("{not json", "header of the gates is damaged"),
        ("[1, 2]", r"format is \[1, 2\], expected 'mole-vl gates 1'"),
        ({"experts": "ann"}, "lacks or garbles"),
        ({"experts": [{"name": ["ann"], "sha256": None}]}, r"called \[\['ann'\]\], expected words"),
        (
            {"site": "nowhere", "after": "2", "features": 3},
            r"site is 'nowhere', .*; after is a str, expected a int; features is a int",
        ),
        ({"gate": {"name": "Sum"}}, "gate is a dict, expected a GateSpec"),
        ({"gate": {"kind": "Nonsense"}}, "no specification: unknown kind 'Nonsense'"),
    ],
)
def test_a_garbled_header_is_told_when_the_file_is_read(tmp_path, changed, words):
    path = tmp_path / "gates.safetensors"
    model = Toy()
    save_gates(mix(model, three(model), gate=MoLE(), blocks=BLOCKS), path)
    if isinstance(changed, dict):
        with safe_open(path, framework="pt") as file:
            changed = json.dumps(json.loads(file.metadata()["mole_vl"]) | changed)
    save_file(load_file(path), path, metadata={"mole_vl": changed})
    with pytest.raises(ValueError, match=rf"gates\.safetensors: .*{words}"):
        read_gates(path)


def test_gates_that_are_no_numbers_are_refused(tmp_path):
    model = Toy()
    file = tmp_path / "gates.safetensors"
    save_gates(mix(model, three(model), gate=MoLE(), blocks=BLOCKS), file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("bias"))
    save_file({**tensors, key: tensors[key] * float("nan")}, file, metadata)
    with pytest.raises(ValueError, match=f"gates' tensor '?{key}'? holds NaN or infinite values"):
        read_gates(file)
