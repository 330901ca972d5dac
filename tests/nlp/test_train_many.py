"""Many at once: each ends as it would have alone, and answers as it does alone."""

from dataclasses import replace

import pytest
import torch

from mole_vl import mix, read_peft
from mole_vl.gate_file import write_gates
from mole_vl.gates import BySite, Router, Sum, TopP
from mole_vl.lora import LoRA
from mole_vl.mixlora import Form, MixLoRA
from mole_vl.mixture_folder import mix_saved, save_mixture
from mole_vl.mola import MoLA
from mole_vl.tenants import (
    mix_saved_tenants,
    mix_tenants,
    save_tenant,
    tenant_parameters,
    tenant_records,
)
from mole_vl.training import FitConfig
from nlp.adapter import blocks
from nlp.data import collate_prompts, encode_rows, write_rows
from nlp.models import load_base
from nlp.train_many import ManyConfig, TenantConfig, main
from nlp.train_mixture import MixtureConfig, main as train_alone
from tests.nlp.toys import ROWS, tiny_folder, tiny_model

SMALL = Form(rank=2, alpha=4)
KINDS = {
    "loras": {
        "ann": LoRA(form=SMALL, dropout=0.2, seed=1),
        "bob": LoRA(form=Form(rank=3, alpha=1), targets=("q_proj", "up_proj"), dropout=0.2),
        "cyd": LoRA(form=Form(rank=1, dora=True), targets=("q_proj",), dropout=0.2),
    },
    "mixlora": {
        "ann": MixLoRA(
            experts=3, form=SMALL, dropout=0.2, spread=0.5, balance=0.1, z=0.1, jitter=0.1
        ),
        "bob": LoRA(form=SMALL, dropout=0.2, seed=2),
        "cyd": MixLoRA(experts=2, form=Form(rank=1), choice=TopP(p=0.5), dropout=0.2, seed=3),
    },
    "mola": {
        "ann": MoLA(experts=(2, 3), top_k=(1, 2), rank=2, dropout=0.2, balance=0.1),
        "bob": LoRA(form=SMALL, targets=("down_proj",), dropout=0.2),
    },
}


@pytest.fixture
def base(tmp_path):
    return str(tiny_folder(tmp_path / "base"))


def fitted(folder, **changes):
    return FitConfig(
        output=folder,
        **{"steps": 4, "rows": 2, "lr": 0.02, "clip": 0.5, "progress": False, "save_every": 2}
        | changes,
    )


def together(tmp_path, base, methods, **changes):
    tenants = []
    for place, (name, method) in enumerate(methods.items()):
        write_rows(tmp_path / f"{name}.jsonl", ROWS[place:] + ROWS[:place])
        data = tmp_path / f"{name}.jsonl"
        tenants.append(TenantConfig(name=name, method=method, data=data))
    return ManyConfig(
        tenants=tuple(tenants),
        fit=fitted(tmp_path / "run", **changes),
        output=tmp_path / "together",
        base=base,
    )


def alone(tmp_path, base, name, method, **changes):
    data = tmp_path / f"{name}.jsonl"
    run = fitted(tmp_path / f"{name}_run", **changes)
    train_alone(
        MixtureConfig(
            method=method, train=(data,), held_out=data, fit=run,
            output=tmp_path / "alone" / name, base=base,
        )
    )  # fmt: skip
    return tmp_path / "alone" / name


def loaded(base, folder):
    """A folder's mixture on the base, or its LoRA."""
    model, _ = load_base(base)
    if (folder / "adapter_config.json").exists():
        return model, mix(model, [read_peft(folder)], gate=Sum(), site="matrix")
    return model, mix_saved(model, folder, blocks=blocks(model))


@pytest.mark.parametrize("kind", KINDS)
def test_each_ends_as_it_would_have_alone_and_answers_so(kind, tmp_path, base):
    methods = KINDS[kind]
    config, slow = together(tmp_path, base, methods), next(iter(methods))
    first, *others = config.tenants
    config = replace(config, tenants=(replace(first, lr=0.3 * config.fit.lr), *others))
    main(config)
    _, tokenizer = load_base(base)
    rows = collate_prompts(encode_rows(ROWS, tokenizer), 0)
    shown = {key: rows[key] for key in ("input_ids", "attention_mask")}
    expected = {}
    for name, method in methods.items():
        rate = {"lr": 0.3 * config.fit.lr} if name == slow else {}
        _, own = loaded(base, alone(tmp_path, base, name, method, **rate))
        model, found = loaded(base, config.output / name)
        for one, other in zip(own.experts(), found.experts(), strict=True):
            for path, factors in one.layers.items():
                for key, tensor in factors.tensors().items():
                    twin = other.layers[path].tensors()[key]
                    torch.testing.assert_close(twin, tensor, rtol=1e-3, atol=2e-5)
        for key, tensor in own.gates.state_dict().items():
            if "/" in key and "values" not in key:
                twin = found.gates.state_dict()[key]
                torch.testing.assert_close(twin, tensor, rtol=1e-3, atol=2e-5)
        with found.condition(real=shown["attention_mask"].bool()), torch.no_grad():
            expected[name] = model(**shown).logits

    model, _ = load_base(base)
    folders = {name: config.output / name for name in methods}
    served = mix_saved_tenants(model, folders, blocks=blocks(model))
    owners = [list(methods)[place % len(methods)] for place in range(len(ROWS))]
    told = served.condition(real=shown["attention_mask"].bool(), tenant=owners)
    with told, torch.no_grad():
        logits = model(**shown).logits
    for place, name in enumerate(owners):
        real = shown["attention_mask"][place].bool()
        torch.testing.assert_close(
            logits[place][real], expected[name][place][real], rtol=1e-3, atol=1e-4
        )


def test_broken_off_and_gone_on_with(tmp_path, base):
    config = together(tmp_path, base, KINDS["mixlora"], schedule="constant")
    main(config)
    twin = replace(
        config, output=tmp_path / "twin", fit=replace(config.fit, output=tmp_path / "twin_run")
    )
    main(replace(twin, fit=replace(twin.fit, steps=2)))
    main(twin)
    for file in config.output.rglob("*.safetensors"):
        assert (twin.output / file.relative_to(config.output)).read_bytes() == file.read_bytes()


def test_beams_and_cached_answers_are_each_tenants_own(tmp_path):
    model = tiny_model()
    methods = {"ann": KINDS["mixlora"]["ann"], "bob": KINDS["mixlora"]["bob"]}
    mixture = mix_tenants(model, methods, blocks=blocks(model))
    with torch.no_grad():
        for parameter in mixture.parameters_of_experts().values():
            parameter.normal_(0, 0.3)
    ids = torch.tensor([[5, 9, 2, 7], [3, 4, 8, 6]])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 79}
    for name in methods:
        save_tenant(mixture, name, tmp_path / name)
    for beams in (1, 3):
        with mixture.condition(tenant=["ann", "bob"], hold=True):
            found, uncached = (
                model.generate(ids, num_beams=beams, use_cache=cache, **how)
                for cache in (True, False)
            )
        assert torch.equal(found, uncached)
        for place, name in enumerate(methods):
            plain = tiny_model()
            mix_saved_tenants(plain, {name: tmp_path / name}, blocks=blocks(plain))
            with plain.mixture.condition(tenant=[name], hold=True):  # pyright: ignore
                own = plain.generate(ids[place : place + 1], num_beams=beams, **how)
            assert torch.equal(found[place : place + 1, : own.shape[1]], own)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": MixLoRA(), "b": MoLA()}, r"share other layers \(a: feedforward, b: matrix\)"),
        ({"a": LoRA(), "b": LoRA(dropout=0.1)}, r"dropouts differ \(a: 0.05, b: 0.1\)"),
        ({"a/b": LoRA()}, "expected a plain word"),
        ({}, "tenants: none is given"),
    ],
)
def test_tenants_that_cannot_be_together_are_told(methods, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        mix_tenants(model, methods, blocks=blocks(model))
    assert not hasattr(model, "mixture")


def test_rows_without_a_tenant_are_told(tmp_path):
    model = tiny_model()
    mixture = mix_tenants(model, KINDS["loras"], blocks=blocks(model))
    ids = torch.tensor([[5, 9, 2, 7]])
    with pytest.raises(RuntimeError, match=r"say whose each is, by condition\(tenant="):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="tenant names 'dan', and this mixture's tenants are ann"):
        mixture.condition(tenant=["dan"])
    with pytest.raises(ValueError, match="tenant is 'ann', expected a list, a name for each row"):
        mixture.condition(tenant="ann")
    for asked in (
        lambda: save_tenant(mixture, "dan", tmp_path / "dan"),
        lambda: tenant_parameters(mixture, "dan"),
        lambda: tenant_records(mixture, "dan", []),
    ):
        with pytest.raises(ValueError, match="'dan' is none of this mixture's, which are ann, bob"):
            asked()
    plain = tiny_model()
    other = MixLoRA(experts=2, form=SMALL).mix(plain, blocks=blocks(plain))
    with pytest.raises(ValueError, match="this is no mixture of tenants"):
        save_tenant(other, "ann", tmp_path / "ann")
    with pytest.raises(ValueError, match="this mixture's tenants are none"):
        other.condition(tenant=["ann"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tenants": ()}, "tenants is empty"),
        ({"twice": True}, "two tenants are called ann"),
        ({"fit": {"micro_rows": 1}}, "fit.micro_rows is set"),
        ({"above": True}, "which is the folder of the tenant run or lies in it"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, base, change, message):
    config = together(tmp_path, base, KINDS["loras"])
    if change.pop("twice", False):
        change["tenants"] = config.tenants[:1] * 2
    if change.pop("above", False):
        change["tenants"] = (replace(config.tenants[0], name="run"),)
        change["output"] = config.fit.output.parent
    if "fit" in change:
        change["fit"] = replace(config.fit, **change["fit"])
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_gates_that_differ_in_kind_by_site_are_told():
    with pytest.raises(ValueError, match="do not read alike"):
        BySite(default=Router(), sites={"blocks.0": Sum()})


def test_any_plain_word_names_a_tenant(tmp_path, base):
    methods = {"ann.v2": KINDS["mixlora"]["ann"], "train": KINDS["mixlora"]["cyd"]}
    config = together(tmp_path, base, methods)
    main(config)
    _, alone_ = loaded(base, alone(tmp_path, base, "ann.v2", methods["ann.v2"]))
    model, _ = load_base(base)
    folders = {name: config.output / name for name in methods}
    served = mix_saved_tenants(model, folders, blocks=blocks(model))
    routers = served.gates.state_dict()
    for key, tensor in alone_.gates.state_dict().items():
        site, _, rest = key.partition(".")
        twin = routers[f"{site}.gates.of ann/v2.{rest}"]
        torch.testing.assert_close(twin, tensor, rtol=1e-3, atol=2e-5)
    assert served.names[0] == "ann.v2.expert0"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_lies_in_a_tenants_place_is_not_lost(what, tmp_path, base):
    config = together(tmp_path, base, KINDS["mola"])
    place = config.output / "bob"
    notes = place if what == "file" else place / "notes"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    message = "bob is a file, expected a folder" if what == "file" else "bob holds notes, which is"
    with pytest.raises(ValueError, match=message):
        main(config)
    assert notes.read_text() == "mine"
    assert not config.fit.output.exists()


def test_a_damaged_tenant_is_told(tmp_path):
    model = tiny_model()
    mixture = KINDS["mixlora"]["ann"].mix(model, blocks=blocks(model))
    save_mixture(mixture, tmp_path / "ann")
    gates, (_first, *rest) = mixture.gates.state_dict(), mixture.gates.state_dict()
    write_gates(
        tmp_path / "ann/gates/model.safetensors",
        dict(zip(mixture.names, mixture.digests, strict=True)),
        "feedforward",
        1,
        mixture.spec,
        {key: gates[key] for key in rest},
    )
    plain = tiny_model()
    with pytest.raises(ValueError, match=r"tenants: at model/layers/0/mlp.* is missing in .*ann"):
        mix_saved_tenants(plain, {"ann": tmp_path / "ann"}, blocks=blocks(plain))
    assert not hasattr(plain, "mixture")
    file = "adapter_model.safetensors"
    save_mixture(mixture, tmp_path / "ann")
    swapped = (tmp_path / "ann/experts/expert1" / file).read_bytes()
    (tmp_path / "ann/experts/expert0" / file).write_bytes(swapped)
    with pytest.raises(ValueError, match="was trained with other factors of expert0"):
        mix_saved_tenants(plain, {"ann": tmp_path / "ann"}, blocks=blocks(plain))


def test_a_lora_that_was_trained_alone_is_served_beside_a_mixture(tmp_path, base):
    own = {"ann": KINDS["mixlora"]["ann"], "bob": LoRA(form=SMALL, dropout=0.0)}
    write_rows(tmp_path / "ann.jsonl", ROWS)
    write_rows(tmp_path / "bob.jsonl", ROWS)
    folders = {name: alone(tmp_path, base, name, method) for name, method in own.items()}
    ids = torch.tensor([[5, 9, 2, 7]])
    expected = {}
    for name, folder in folders.items():
        model, _ = loaded(base, folder)
        with torch.no_grad():
            expected[name] = model(input_ids=ids).logits
    model, _ = load_base(base)
    served = mix_saved_tenants(model, folders, blocks=blocks(model))
    with served.condition(tenant=["ann", "bob"]), torch.no_grad():
        found = model(input_ids=ids.expand(2, -1)).logits
    for row, name in enumerate(own):
        torch.testing.assert_close(found[row : row + 1], expected[name], rtol=1e-4, atol=1e-5)
