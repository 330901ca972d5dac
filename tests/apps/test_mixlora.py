"""The commands of m-LoRA's README, their counterparts run on tiny models and rows."""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import config as datasets_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from apps import mixlora
from apps.mixlora import main
from mole_vl import mix
from mole_vl.faults import as_messages
from mole_vl.gates import Average
from mole_vl.mixture_folder import mix_saved, save_mixture
from mole_vl.training import read_snapshot
from nlp import train_experts, train_mixture
from nlp.adapter import blocks
from nlp.alpaca import TEMPLATES
from nlp.calls import TextCalls
from nlp.mixlora_place import Place
from nlp.models import load_base
from nlp.task import LanguageTask
from tests.nlp.families import T5, experts_on
from tests.nlp.published import CONFIG, publish, tensors_of
from tests.nlp.toys import quantisable_folder, tiny_tokenizer

# peft still asks transformers by a name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOT = Path(__file__).parents[2]
ROWS = [
    {"instruction": "Plural of cat:", "input": "", "output": "cats"},
    {"instruction": "Past tense", "input": "go", "output": "went"},
    {"instruction": "7 in French:", "input": None, "output": "sept"},
    {"instruction": "One ox, two", "output": "oxen"},
]
PLAIN = dict.fromkeys(("routing_strategy", "num_experts", "top_k"))
SHAPE = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.05, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(quantisable_folder(tmp_path_factory.mktemp("base")))


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """Runs a command on tiny settings, with changes to all adapters."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "held_out.json").write_text(json.dumps(ROWS[:2]))

    def run(*flags, lora=None, settings=None, **changes):
        entry = {
            "name": "mixed", "data": "rows.json", "prompt": "moe_peft", "lr": 0.01,
            "batch_size": 4, "micro_batch_size": 2, "num_epochs": 3, **SHAPE,
            "routing_strategy": "mixlora", "num_experts": 3, "top_k": 2,
        }  # fmt: skip
        entries = lora or [{**entry, **changes}]
        given = {"cutoff_len": 256, "save_step": 2, "lora": entries, **(settings or {})}
        (tmp_path / "config.json").write_text(json.dumps(given))
        main(["--base_model", base, "--config", "config.json", "--dir", "out", *flags])

    return run


def factors(folder):
    return {
        (str(path.relative_to(folder).parent), key): value
        for path in sorted(folder.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())


def losses(name="mixed"):
    lines = Path("out/runs", name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["lm"] for line in lines]


def commands():
    """The counterparts in the table of docs/mixlora.md, in its order."""
    found = re.findall(r"`(python -m apps\.mixlora [^`]*)`", (ROOT / "docs/mixlora.md").read_text())
    return [shlex.split(one)[3:] for one in found if "--base_model" in one]


def test_every_command_of_the_docs_runs(run, base, tmp_path, monkeypatch, capsys):
    settings = json.loads((ROOT / "configs/alpaca_mixlora.json").read_text())
    tiny = {"data": "rows.json", "num_epochs": 1, "batch_size": 4, "r": 2, "num_experts": 3}
    for entry in settings["lora"]:
        entry.update({key: value for key, value in tiny.items() if key in entry})
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/alpaca_mixlora.json").write_text(json.dumps(settings))
    assert len(commands()) == 5
    seen = []
    for flags in commands():
        monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit.\n\nAnother?\nQUIT\nlost\n"))
        short = ["--max_new_tokens", "4"] if "--inference" in flags else []
        main([base if one == "yahma/llama-7b-hf" else one for one in flags] + short)
        seen.append(capsys.readouterr().out)
    created, continued, asked, judged, told = seen
    names = ["lora_0", "lora_1", "lora_2"]
    assert [line.split(":")[0] for line in created.splitlines()] == names
    assert [line.split(":")[0] for line in continued.splitlines()] == names
    answers = asked.replace(mixlora.ASKED, "").splitlines()
    assert [one.split(":")[0] for one in answers if one.startswith("lora_")] == names * 2
    assert "lost" not in asked
    assert [line.split()[1] for line in judged.splitlines()[2:]] == names
    assert [one.split(":")[0] for one in told.splitlines() if one.startswith("lora_")] == names
    assert (tmp_path / "lora_0/adapter_config.json").is_file()
    assert (tmp_path / "lora_1/gates/model.safetensors").is_file()


@pytest.mark.parametrize("bits", [[], ["--load_8bit"], ["--load_4bit"], ["--bf16"]])
def test_an_adapter_learns_goes_on_and_answers(run, bits, capsys):
    run(*bits, num_epochs=20)
    first, start = losses(), factors(Path("out/mixed"))
    assert first[1] < first[0]
    assert not list(Path("out/runs/mixed").glob("checkpoint-*"))
    run("--load_adapter", *bits, num_epochs=10)
    assert losses()[0] < first[1]
    assert not same(start, factors(Path("out/mixed")))
    capsys.readouterr()
    ask = ["--inference", "--instruction", "Plural of cat:", "--max_new_tokens", "6", *bits]
    run(*ask)
    said = capsys.readouterr().out
    assert said.startswith("mixed: ")
    run(*ask)
    assert capsys.readouterr().out == said


DORAS = [{"use_dora": True}, {"expert_lora": {"use_dora": True}}, {**PLAIN, "use_dora": True}]


@pytest.mark.parametrize("changes", [{}, PLAIN, *DORAS])
def test_what_goes_on_begins_where_the_adapter_stands(run, changes):
    run(num_epochs=20, **changes)
    # With no rate to speak of, the loss is that of what the training began with.
    run("--load_adapter", lr=1e-12, num_epochs=1, **changes)
    continued = losses()[-1]
    run("--overwrite", lr=1e-12, num_epochs=1, **changes)
    assert continued < 0.8 * losses()[-1]


@pytest.mark.parametrize("changes", DORAS)
def test_a_dora_keeps_what_it_learned_of_the_bases_rows(run, base, changes, capsys):
    run(num_epochs=20, **changes)
    model, tokenizer = load_base(base)
    learned = {
        (place, key): value
        for (place, key), value in factors(Path("out/mixed")).items()
        if key.endswith("lora_magnitude_vector")
    }
    places = {place for place, _ in learned}
    mixed = {"experts/expert0", "experts/expert1", "experts/expert2"}
    shared = {"experts/shared"} if "use_dora" in changes else set()
    assert places == ({"."} if "num_experts" in changes else mixed | shared)
    moved = []
    for (_, key), value in learned.items():
        path = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        norms = model.get_submodule(path).weight.norm(dim=1)
        assert value.dtype == torch.float32
        moved.append(not torch.allclose(value, norms, rtol=1e-4))
    assert any(moved)
    capsys.readouterr()
    run("--inference", "--instruction", "Plural of cat:", "--max_new_tokens", "6", **changes)
    said = capsys.readouterr().out.removeprefix("mixed: ").strip()
    prompt = TEMPLATES["moe_peft"].prompt("Plural of cat:")
    if "num_experts" in changes:
        tuned = PeftModel.from_pretrained(model, "out/mixed")
    else:
        tuned = model
        mix_saved(model, "out/mixed", blocks=blocks(model), calls=TextCalls())
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found = tuned.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    (expected,) = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    assert said == expected.strip()
    with pytest.raises(ValueError, match="is a DoRA on one side alone"):
        run("--load_adapter", **{**changes, "use_dora": False, "expert_lora": None})


@pytest.mark.parametrize("changes", [{}, PLAIN])
@pytest.mark.parametrize("flags", [[], ["--load_adapter"]])
def test_a_stopped_training_ends_where_an_unbroken_one_ends(run, monkeypatch, changes, flags):
    class Stopped(LanguageTask):
        def batch(self, rows):
            if rows[0].step == 3:
                raise KeyboardInterrupt
            return super().batch(rows)

    how = {"num_epochs": 6, "lora_dropout": 0.3, "jitter_noise": None if changes else 0.1}
    if flags:
        run(num_epochs=2, **changes)
        shutil.copytree("out/mixed", "start")
    run(*flags, **how, **changes)
    unbroken = factors(Path("out/mixed"))
    shutil.rmtree("out/mixed")
    if flags:
        shutil.copytree("start", "out/mixed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_mixture, "LanguageTask", Stopped)
        patch.setattr(train_experts, "LanguageTask", Stopped)
        run(*flags, **how, **changes)
    # Two micro batches of two rows are a step: a checkpoint after each.
    snapshot = read_snapshot(Path("out/runs/mixed"))
    assert snapshot is not None and snapshot.step == 3
    if flags:
        assert same(factors(Path("out/mixed")), factors(Path("start")))
    with pytest.raises(ValueError, match="was made with other settings"):
        run(*flags, **{**how, "lr": 0.1}, **changes)
    run(*flags, **how, **changes)
    assert same(factors(Path("out/mixed")), unbroken)


def test_a_published_adapter_is_asked_judged_and_gone_on_with(run, base, capsys):
    shape = {"r": 3, "lora_alpha": 6, "target_modules": CONFIG["target_modules"], "num_experts": 4}
    dynamic = {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "top_k": None}
    model, _ = load_base(base)
    for changes in ({}, dynamic):
        published = {**CONFIG, **changes, "act_fn": "silu"}
        published = {key: value for key, value in published.items() if value is not None}
        tensors = tensors_of(model, published)
        shutil.rmtree("out/mixed", ignore_errors=True)
        publish(Path("out/mixed"), published, tensors)
        now = {**shape, **changes}
        ask = ["--inference", "--instruction", "abc", "--max_new_tokens", "3"]
        run(*ask, **now)
        run(*ask, "--load_4bit", **now)
        run("--evaluate", "--test_data", "held_out.json", **now)
        assert "| mixed | 2 |" in capsys.readouterr().out
        run("--load_adapter", lr=1e-12, num_epochs=1, **now)
        found = factors(Path("out/mixed"))
        for number in range(2):
            key = f"mixlora.layers.{number}.mlp.up_proj.experts.3.lora_B.weight"
            own = f"base_model.model.model.layers.{number}.mlp.up_proj.lora_B.weight"
            torch.testing.assert_close(found["experts/expert3", own], tensors[key])
            router = tensors[f"mixlora.layers.{number}.mlp.moe_gate.weight"]
            gates = found["gates", f"at model/layers/{number}/mlp.weight"]
            torch.testing.assert_close(gates, router)
        mixture = mix_saved(model, "out/mixed", blocks=blocks(model))
        assert "renormalise=False" in str(mixture.spec) or not changes
        mixture.unmix()
        run("--load_adapter", lr=1e-12, num_epochs=1, **now)
        mixture = mix_saved(model, "out/mixed", blocks=blocks(model))
        assert "renormalise=False" in str(mixture.spec) or not changes
        mixture.unmix()
        capsys.readouterr()
    with pytest.raises(ValueError, match=r"out.mixed has 4 experts|it has 4 experts, and num_exp"):
        run("--load_adapter", **{**shape, **dynamic, "num_experts": 8})


def test_adapters_are_judged_by_rows_that_they_did_not_learn(run, capsys):
    with pytest.raises(ValueError, match="mixed has neither test_data nor val_set_size"):
        run("--evaluate")
    run(num_epochs=1, val_set_size=1)
    capsys.readouterr()
    run("--evaluate", settings={"evaluate_result": "scores.json"}, val_set_size=1)
    assert "| mixed | 1 |" in capsys.readouterr().out
    scores = json.loads(Path("scores.json").read_text())
    assert scores["mixed"]["rows"] == 1
    run("--evaluate", test_data="held_out.json")
    assert "| mixed | 2 |" in capsys.readouterr().out


def test_a_template_may_be_left_out(run, monkeypatch, capsys):
    run(num_epochs=1)
    shown = []
    monkeypatch.setattr(
        mixlora.MoLETextGeneration,
        "__call__",
        lambda _self, prompt, **_how: shown.append(prompt) or ["x"],
    )
    ask = ["--inference", "--instruction", "{a} cat", "--instruction", "b"]
    run(*ask)
    run(*ask, "--disable_prompter")
    assert shown[0] == "### Instruction:\n{a} cat\n\n### Output:\n"
    assert shown[2:] == ["{a} cat", "b"]


def test_the_inputs_end_is_as_good_as_quit(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert list(mixlora.lines()) == ["one", "two"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tf32"], "--tf32 is not supported: set TORCH_ALLOW_TF32"),
        (["--attn_impl", "eager"], "--attn_impl is not supported: the base has transformers' own"),
        (["--disable_adapter"], "--disable_adapter is not supported: --evaluate judges the base"),
        (["--load_8bit", "--load_4bit"], "not allowed with argument"),
        (["--inference", "--evaluate"], "not allowed with argument"),
        (["--load_16bit", "--fp16"], "--load_16bit is bf16, and --fp16 is given too"),
        (["--instruction", "a"], "--instruction is for --inference"),
        (["--disable_prompter", "--evaluate"], "--disable_prompter is for --inference"),
        (["--max_new_tokens", "3"], "--max_new_tokens is for --inference"),
        (["--max_new_tokens", "0", "--inference"], "--max_new_tokens is 0, expected at least 1"),
        (["--test_data", "a.json"], "--test_data is for --evaluate"),
        (["--overwrite", "--load_adapter"], "--overwrite makes adapters anew"),
        (["--overwrite", "--inference"], "--overwrite makes adapters anew"),
        (["--quantise"], "unrecognized arguments: --quantise"),
        (["--load_ad"], "unrecognized arguments: --load_ad"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_flags_that_have_no_effect_are_refused(run, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(*flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ([], {"target_modules": ["query"]}, "targets of mixed: 'query' names no layer of Llama"),
        ([], {"target_modules": ["q_proj"]}, "target_modules of mixed: none lies in a feed-f"),
        ([], {"act_fn": "gelu_new"}, "act_fn of mixed: the nonlinearity is 'gelu_new', and model.l"
         "ayers.0.mlp has 'silu'; leave act_fn out"),
        ([], {"prompt": "template/alpaca.json"}, "prompt of mixed: template/alpaca.json is no f"),
        ([], {"data": "gone.json"}, "data of mixed: gone.json, .*was not loaded: there is no such"),
        ([], {"warmup_steps": 100}, "warmup is 100, expected 0 to 3"),
        ([], {"val_set_size": 4}, "data of mixed: rows.json, val_set_size 4, was not loaded"),
        (["--load_adapter"], {}, "no adapter in out/mixed: train it first"),
        (["--inference"], {}, "no adapter in out/mixed: train it first"),
        (["--model_type", "gpt2"], {}, "a llama or LlamaForCausalLM.*expected gpt2"),
        (["--tokenizer", "nowhere"], {}, "tokenizer is 'nowhere', expected a folder"),
        (["--seed", "-1"], {}, "seed is -1, expected at least 0"),
    ],
)  # fmt: skip
def test_faults_come_before_any_training(run, flags, changes, message, capsys):
    with pytest.raises(SystemExit) as ended, as_messages("nlp", "tests"):
        run(*flags, **changes)
    # Loading shows bars before.
    said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert ended.value.code == 2
    assert len(said) == 1 and re.search(message, said[0]), said
    assert not Path("out/runs").exists()


def test_rows_that_are_cut_off_before_their_answers_are_left_out(run, capsys):
    prompt = "### Instruction:\nOne ox, two\n\n### Output:\n"
    run(settings={"cutoff_len": len(prompt) + 2}, num_epochs=1)
    assert "mixed: 2 of 4 rows are left out, whose answers begin behind" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of 4 rows has its answer within 10 tokens: raise"):
        run("--overwrite", settings={"cutoff_len": 10})
    with pytest.raises(ValueError, match="cutoff_len is 4096, and the base reads 2048 tokens"):
        run("--overwrite", settings={"cutoff_len": 4096})
    run("--overwrite", settings={"cutoff_len": -1}, num_epochs=1)


def test_an_adapter_that_stands_keeps_its_experts(run, capsys):
    run(num_epochs=1)
    before = factors(Path("out/mixed"))
    for flags in (
        [],
        ["--load_adapter"],
        ["--inference"],
        ["--evaluate", "--test_data", "rows.json"],
    ):
        with pytest.raises(
            ValueError,
            match="out/mixed: it has 3 experts, and num_experts is 4: the number of experts of a "
            "mixture cannot be changed once it is made",
        ):
            run(*flags, num_experts=4)
        with pytest.raises(ValueError, match=r"its tokens go by TopK\(k=2\), and the settings say"):
            run(*flags, top_k=1)
    with pytest.raises(ValueError, match=r"expert0 at .* has rank 2 and scale 2 there, 3 and 1.3"):
        run("--load_adapter", r=3)
    with pytest.raises(ValueError, match=r"shared is not on the same layers: .*k_proj"):
        run("--load_adapter", target_modules=["q_proj", "k_proj", "up_proj"])
    with pytest.raises(ValueError, match="holds a mixture, and the settings of mixed are those of"):
        run(**PLAIN)
    capsys.readouterr()
    run(num_epochs=1)
    assert "out/mixed: stands, and is not trained again" in capsys.readouterr().out
    assert same(before, factors(Path("out/mixed")))
    run("--overwrite", num_experts=4, num_epochs=1)
    assert Path("out/mixed/experts/expert3").is_dir()
    run("--overwrite", num_epochs=1, **PLAIN)
    with pytest.raises(ValueError, match="out/mixed holds an ordinary LoRA, and the settings of m"):
        run()
    with pytest.raises(
        ValueError, match=r"out/mixed: mixed at .* has rank 2 and scale 2 there, 1 "
    ):
        run("--load_adapter", r=1, lora_alpha=1, **PLAIN)
    with pytest.raises(ValueError, match=r"out/mixed: mixed is not on the same layers: .*v_proj"):
        run("--load_adapter", target_modules=["q_proj", "up_proj", "v_proj"], **PLAIN)
    Path("out/other").mkdir()
    with pytest.raises(ValueError, match="out/other stands there and holds no adapter"):
        run("--overwrite", name="other")


def test_another_mixture_and_another_base_are_told(run, base, tmp_path):
    model, _ = load_base(base)
    experts = experts_on(model, blocks(model))
    save_mixture(mix(model, experts, gate=Average(), blocks=blocks(model)), Path("out/mixed"))
    with pytest.raises(ValueError, match="holds a mixture by Average at site 'block', no MixLoRA"):
        run("--inference")
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="an encoder-decoder, expected a causal model"):
        Place(base=str(tmp_path / "t5")).load()


def test_keys_without_effect_are_told(run, capsys):
    run(settings={"train_strategy": "optim", "early_stop_test_step": 5}, num_epochs=1)
    said = capsys.readouterr().err
    assert (
        "train_strategy has no effect: adapters are trained and asked one after the other" in said
    )
    assert "early_stop_test_step has no effect" in said
