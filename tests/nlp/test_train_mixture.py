"""`nlp.train_mixture`: a run from configuration to table, broken off, gone on with, read back."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from mole_vl.gate_file import write_gates
from mole_vl.gates import TopK
from mole_vl.mixlora import Form, MixLoRA
from mole_vl.mixture_folder import mix_saved, save_mixture, take_saved
from mole_vl.mola import MoLA
from mole_vl.training import FitConfig
from nlp.adapter import blocks, bound
from nlp.answers import answers
from nlp.calls import TextCalls
from nlp.data import collate_prompts, encode_rows, write_rows
from nlp.models import load_base
from nlp.train_mixture import MixtureConfig, main
from pipelines import MoLETextGeneration
from tests.nlp.toys import ROWS, tiny_folder, tiny_model

# peft still asks transformers by a name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOT = Path(__file__).parents[2]
METHODS = {
    "mixlora": MixLoRA(experts=3, form=Form(rank=2, alpha=4), dropout=0.2, jitter=0.1, spread=0.5),
    "dora": MixLoRA(experts=3, form=Form(rank=2, alpha=4, dora=True), dropout=0.2, z=0.1),
    "mola": MoLA(experts=(2, 3), rank=(1, 2), alpha=4, dropout=0.2, balance=0.01),
}


@pytest.fixture
def config(tmp_path):
    data = tmp_path / "rows.jsonl"
    write_rows(data, ROWS)
    return MixtureConfig(
        method=METHODS["mixlora"],
        train=(data, data),
        held_out=data,
        fit=FitConfig(
            output=tmp_path / "run", steps=6, rows=4, lr=0.02, schedule="constant", save_every=2,
            progress=False,
        ),
        output=tmp_path / "mixture",
        base=str(tiny_folder(tmp_path / "base")),
    )  # fmt: skip


def tensors(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_run_broken_off_is_the_unbroken_one(config, method, capsys):
    config = replace(config, method=METHODS[method])
    main(config)
    assert "| exact match | base | mixture |" in capsys.readouterr().out
    twin = replace(
        config,
        output=config.output.with_name("twin"),
        fit=replace(config.fit, output=config.fit.output.with_name("broken")),
    )
    main(replace(twin, fit=replace(twin.fit, steps=3)))
    assert tensors(twin.output) != tensors(config.output)
    main(twin)
    assert tensors(twin.output) == tensors(config.output)


def written(config, folder, name, **method):
    """The settings as a file, for a run and a mixture of other names."""
    kind = {"experts": 3, "form": {"rank": 2, "alpha": 4.0}, "spread": 0.5}
    settings = {
        "method": {"class_path": "mole_vl.mixlora.MixLoRA", "init_args": kind | method},
        "train": [str(path) for path in config.train],
        "held_out": str(config.held_out),
        "fit": {
            "output": str(folder / name), "steps": 6, "rows": 4, "lr": 0.02,
            "schedule": "constant", "save_every": 1, "progress": False,
        },
        "output": str(folder / f"{name}_mixture"),
        "base": config.base,
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return ["-m", "nlp.train_mixture", "--config", str(file)]


def test_two_processes_equal_one(config, tmp_path):
    how = {"dropout": 0.3, "jitter": 0.2, "balance": 1.0, "z": 0.5}
    alone = [sys.executable, *written(config, tmp_path, "one", **how)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    together = [*launcher, "--nproc_per_node", "2", *written(config, tmp_path, "two", **how)]
    told = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for command in (alone, together):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=told, timeout=300)
    one, two = (
        {
            str(f.relative_to(tmp_path / f"{name}_mixture")): load_file(f)
            for f in (tmp_path / f"{name}_mixture").rglob("*.safetensors")
        }
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for file, tensors_ in one.items():
        for key, tensor in tensors_.items():
            torch.testing.assert_close(two[file][key], tensor, rtol=1e-3, atol=1e-5)


def test_kill_nine_and_resume(config, tmp_path):
    main(config)
    command = [
        sys.executable, *written(config, tmp_path, "killed", dropout=0.2, jitter=0.1)
    ]  # fmt: skip
    run = subprocess.Popen(command, cwd=ROOT)
    while not (tmp_path / "killed").exists() and run.poll() is None:
        time.sleep(0.01)
    time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed_mixture").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert tensors(tmp_path / "killed_mixture") == tensors(config.output)


def test_going_on_is_not_beginning_anew(config):
    main(config)
    again = replace(
        config,
        start=config.output,
        output=config.output.with_name("more"),
        fit=replace(config.fit, output=config.fit.output.with_name("more_run"), steps=1, lr=1e-9),
    )
    main(again)
    model, _ = load_base(config.base)
    first = mix_saved(model, config.output, blocks=blocks(model)).experts()
    model, _ = load_base(config.base)
    for one, other in zip(
        first, mix_saved(model, again.output, blocks=blocks(model)).experts(), strict=True
    ):
        for path, factors in one.layers.items():
            torch.testing.assert_close(other.layers[path].b, factors.b, rtol=0, atol=1e-7)
            assert factors.b.any()


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_gives_the_mixture_back_everywhere(config, method):
    config = replace(config, method=METHODS[method])
    main(config)
    model, tokenizer = load_base(config.base)
    mixture = mix_saved(model, config.output, blocks=blocks(model), calls=TextCalls())
    rows = encode_rows(ROWS, tokenizer)
    said = answers(model, tokenizer, rows, around=bound(mixture))
    pipe = MoLETextGeneration.from_pretrained(config.base)
    pipe.load_experts(sorted((config.output / "experts").iterdir()))
    pipe.load_gates(config.output / "gates")
    longest = max(len(row.answer) for row in rows) + 2
    found = pipe([row.prompt for row in ROWS], max_new_tokens=longest)
    assert [text.strip().partition("\n")[0] for text in found] == said
    MoLETextGeneration(model, tokenizer).save_pretrained(config.output.parent / "kept")
    kept = MoLETextGeneration.from_pretrained(config.output.parent / "kept")
    assert kept([row.prompt for row in ROWS], max_new_tokens=longest) == found
    prompts = collate_prompts(rows, 0)
    shown = {key: prompts[key] for key in ("input_ids", "attention_mask")}
    cached, uncached = (
        model.generate(**shown, max_new_tokens=5, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    # Every expert is a LoRA like any other.
    name = mixture.names[0]
    with mixture.pinned({name: 1.0}), torch.no_grad():
        expected = model(input_ids=prompts["input_ids"][:1]).logits
    adapted = PeftModel.from_pretrained(load_base(config.base)[0], config.output / "experts" / name)
    with torch.no_grad():
        alone = adapted(input_ids=prompts["input_ids"][:1]).logits
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_mixture_keeps_its_experts(config, tmp_path):
    model = tiny_model()
    save_mixture(METHODS["mixlora"].mix(model, blocks=blocks(model)), tmp_path / "three")
    for method, message in [
        (replace(METHODS["mixlora"], experts=4), "holds 4 experts .* this mixture has 5"),
        (
            replace(METHODS["mixlora"], form=Form(rank=3, alpha=6)),
            "has rank 2 and scale 2 there, 3 and 2 here",
        ),
        (replace(METHODS["mixlora"], targets=("up_proj", "q_proj")), "is not on the same layers"),
        (
            replace(METHODS["mixlora"], choice=TopK(k=1)),
            "choice was {'kind': 'TopK', 'k': 2}, is {'kind': 'TopK', 'k': 1}",
        ),
    ]:
        other = tiny_model()
        mixture = method.mix(other, blocks=blocks(other))
        before = mixture.digests
        with pytest.raises(ValueError, match=message):
            take_saved(mixture, tmp_path / "three")
        assert mixture.digests == before
    with pytest.raises(
        FileNotFoundError, match=r"model.safetensors is no file, expected the gates"
    ):
        take_saved(METHODS["mixlora"].mix(tiny_model(), blocks=blocks(tiny_model())), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train is empty"),
        ({"output": "run"}, "which is output or lies in it"),
        (
            {"output": "above"},
            "which is output or lies in it: the mixture would take its run's place",
        ),
        ({"asked": 0}, "asked is 0"),
        ({"method": MixLoRA}, "method is the class MixLoRA, expected an instance"),
    ],
)
def test_what_cannot_be_is_told(config, change, message):
    places = {"run": config.fit.output, "above": config.fit.output.parent}
    change = {k: places.get(v, v) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_what_lies_in_the_mixtures_place_is_not_lost(config, monkeypatch):
    config.output.mkdir()
    thesis = config.output / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(
        ValueError, match=r"output: .*mixture holds thesis.txt, which is no part of"
    ):
        main(config)
    assert thesis.read_text() == "years of work"
    thesis.unlink()
    monkeypatch.chdir(config.output)
    with pytest.raises(ValueError, match="is where the program runs, or above it"):
        main(replace(config, output=Path()))
    assert not config.fit.output.exists()


def test_an_expert_that_was_exchanged_is_told(config, tmp_path):
    model = tiny_model()
    save_mixture(METHODS["mixlora"].mix(model, blocks=blocks(model)), config.output)
    experts = config.output / "experts"
    file = "adapter_model.safetensors"
    (experts / "expert1" / file).write_bytes((experts / "expert0" / file).read_bytes())
    mixture = METHODS["mixlora"].mix(tiny_model(), blocks=blocks(tiny_model()))
    before = mixture.digests
    with pytest.raises(ValueError, match="was trained with other factors of expert1; use the same"):
        take_saved(mixture, config.output)
    assert mixture.digests == before


def test_a_start_that_is_no_mixture_is_named_before_the_base_is_loaded(config):
    with pytest.raises(
        FileNotFoundError, match=r"^start: .*none/gates/model.safetensors is no file"
    ):
        main(replace(config, start=config.output.parent / "none", base="/no/base"))


def test_an_experts_name_does_not_leave_the_folder(config):
    model = tiny_model()
    mixture = METHODS["mixlora"].mix(model, blocks=blocks(model))
    save_mixture(mixture, config.output)
    write_gates(
        config.output / "gates/model.safetensors",
        {"../expert0": None},
        "feedforward",
        1,
        mixture.spec,
        mixture.gates.state_dict(),
    )
    with pytest.raises(ValueError, match=r"name is .../expert0., expected a plain word"):
        mix_saved(tiny_model(), config.output, blocks=blocks(model))
