import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

from mole_vl import mix, read_peft
from mole_vl.gates import Sum
from mole_vl.training import FitConfig, read_snapshot
from nlp import train_experts
from nlp.answers import exact_match
from nlp.data import encode_rows, read_rows, write_rows
from nlp.models import load_base
from nlp.task import LanguageTask
from nlp.train_experts import ExpertConfig, ExpertsConfig, main, score_experts
from tests.nlp.families import T5
from tests.nlp.toys import LETTERS, ROWS, tiny_folder, tiny_tokenizer

# peft still asks transformers by a name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def config(tmp_path):
    data = tmp_path / "rows.jsonl"
    write_rows(data, ROWS)
    return ExpertsConfig(
        experts=(
            ExpertConfig(name="plural", data=data, rank=2, alpha=6.0, targets=("q_proj",)),
            ExpertConfig(name="past", data=data, rank=3, alpha=3.0, steps=7),
        ),
        held_out=data,
        fit=FitConfig(
            output=tmp_path / "runs", steps=5, rows=4, lr=0.01, save_every=2, progress=False
        ),
        output=tmp_path / "experts",
        base=str(tiny_folder(tmp_path / "base")),
    )


def factors(config, name):
    return load_file(config.output / name / "adapter_model.safetensors")


def test_each_expert_becomes_a_small_peft_folder_of_its_own_shape(config, capsys):
    main(config)
    assert sorted(path.name for path in config.output.iterdir()) == ["past", "plural"]
    for expert in config.experts:
        settings = json.loads((config.output / expert.name / "adapter_config.json").read_text())
        assert settings["r"] == expert.rank
        assert settings["lora_alpha"] == expert.alpha
        ends = {path.rpartition(".")[2] for path in settings["target_modules"]}
        assert ends == set(expert.targets)
        assert settings["base_model_name_or_path"] == config.base
        tensors = factors(config, expert.name)
        assert {value.dtype for value in tensors.values()} == {torch.float16}
        assert any(value.abs().max() > 0 for key, value in tensors.items() if "lora_B" in key)
    assert "| plural | 2 |" in capsys.readouterr().out


def test_the_folder_gives_the_trained_logits_back(config):
    main(config)
    model, tokenizer = load_base(config.base)
    ids = torch.tensor([encode_rows(ROWS, tokenizer)[0].prompt])
    plain = model(input_ids=ids).logits
    deltas = {}
    for key, a in factors(config, "plural").items():
        if "lora_A" in key:
            b = factors(config, "plural")[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            deltas[path] = 6.0 / 2 * b.float() @ a.float()
    adapted = PeftModel.from_pretrained(model, config.output / "plural")
    found = adapted(input_ids=ids).logits
    adapted.unload()
    for path, delta in deltas.items():
        model.get_submodule(path).weight.add_(delta)
    torch.testing.assert_close(found, model(input_ids=ids).logits)
    assert (found - plain).abs().max() > 1e-4


def test_a_stopped_training_ends_where_an_unbroken_one_ends(config, tmp_path, monkeypatch):
    class Stopped(LanguageTask):
        def batch(self, rows):
            if rows[0].step == 3:
                raise KeyboardInterrupt
            return super().batch(rows)

    main(config)
    runs = replace(config.fit, output=tmp_path / "stopped-runs")
    stopped = replace(config, fit=runs, output=tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_experts, "LanguageTask", Stopped)
        main(stopped)
    assert read_snapshot(runs.output / "plural").step == 2
    assert not stopped.output.exists()
    main(stopped)
    for expert in config.experts:
        found = factors(stopped, expert.name)
        for key, value in factors(config, expert.name).items():
            assert torch.equal(value, found[key])


def test_what_is_done_is_not_done_again(config):
    main(config)
    before = (config.output / "past" / "adapter_model.safetensors").stat().st_mtime_ns
    main(config)
    assert (config.output / "past" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_processes_may_share_a_list_of_experts(config, capsys):
    main(replace(config, only=("past",)))
    assert [path.name for path in config.output.iterdir()] == ["past"]
    table = capsys.readouterr().out
    assert "past" in table
    assert "plural" not in table
    alone = factors(config, "past")
    main(config)
    assert sorted(path.name for path in config.output.iterdir()) == ["past", "plural"]
    assert all(torch.equal(value, alone[key]) for key, value in factors(config, "past").items())
    with pytest.raises(ValueError, match="only names future, expected some of plural, past"):
        replace(config, only=("future", "past"))


def test_experts_are_scored_on_their_own_task_and_leave_the_base_alone(config):
    main(config)
    model, tokenizer = load_base(config.base)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    scores = score_experts(model, tokenizer, config)
    assert [(score.task, score.rows) for score in scores] == [("plural", 2), ("past", 1)]
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    mine = [row for row in read_rows(config.held_out) if row.task == "plural"]
    hits = exact_match(model, tokenizer, encode_rows(mine, tokenizer))
    assert scores[0].base == sum(hits) / 2


def test_a_task_without_held_out_rows_is_a_fault(config):
    main(config)
    stranger = replace(config.experts[0], name="german")
    (config.output / "plural").rename(config.output / "german")
    model, tokenizer = load_base(config.base)
    with pytest.raises(ValueError, match="no row of the task 'german'"):
        score_experts(model, tokenizer, replace(config, experts=(stranger,)))


def test_the_faults_of_a_config_are_reported_together(config):
    with pytest.raises(
        ValueError, match=r"name is 'a/b', .*rank is 0.*alpha is -1.*targets is empty"
    ):
        ExpertConfig(name="a/b", data=config.held_out, rank=0, alpha=-1, targets=())
    with pytest.raises(ValueError, match=r"two experts are called past; .*context is 1"):
        replace(config, experts=(config.experts[1], config.experts[1]), context=1)


def test_faults_come_before_any_training(config):
    first, last = config.experts
    gone = config.held_out.parent / "gone.jsonl"
    odd = ("q_proj", "query", "model.norm")
    mistakes = [
        (replace(config, held_out=gone), r"^held_out: .*gone.jsonl is no file, expected JSON"),
        (
            replace(config, experts=(first, replace(last, data=gone))),
            r"^data of past: .*gone.jsonl is no file",
        ),
        (
            replace(config, experts=(first, replace(last, targets=odd))),
            r"targets of past: 'query' names no layer of LlamaForCausalLM; "
            r"'model.norm' names a LlamaRMSNorm, expected linear layers",
        ),
        (
            replace(config, experts=(first, replace(last, name="german"))),
            "no row of the task 'german'",
        ),
    ]
    for mistaken, message in mistakes:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main(mistaken)
        assert not config.fit.output.exists()


def test_an_encoder_decoder_is_taught_too(config, tmp_path):
    base = tmp_path / "t5"
    torch.manual_seed(0)
    size = {"vocab_size": len(LETTERS) + 1, "eos_token_id": 0}
    T5ForConditionalGeneration(T5Config(**{**T5, **size})).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    experts = tuple(replace(one, targets=("q", "v")) for one in config.experts)
    mine = replace(
        config, base=str(base), experts=experts, output=tmp_path / "of t5",
        fit=replace(config.fit, output=tmp_path / "t5-runs"),
    )  # fmt: skip
    main(mine)
    log = (tmp_path / "t5-runs/plural/metrics.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["lm"] > 0
    model, _ = load_base(str(base))
    learned = read_peft(mine.output / "plural")
    assert learned.layers.keys() == {
        path for path, _ in model.named_modules() if path.rpartition(".")[2] in ("q", "v")
    }
    assert any(factors.b.any() for factors in learned.layers.values())
    settings = json.loads((mine.output / "plural/adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    ids = torch.tensor([[5, 6, 7, 0]])
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    mix(model, [learned], gate=Sum(), site="matrix")
    assert (model(input_ids=ids, decoder_input_ids=ids).logits - before).abs().max() > 1e-5


def test_dropout_is_at_work_in_training_and_drops_the_same_again(config, tmp_path):
    dropping = tuple(replace(one, dropout=0.5) for one in config.experts)
    dropped = replace(
        config, experts=dropping, output=tmp_path / "dropped",
        fit=replace(config.fit, output=tmp_path / "dropped-runs"),
    )  # fmt: skip
    main(config)
    main(dropped)
    plain, found = factors(config, "plural"), factors(dropped, "plural")
    assert any(not torch.equal(value, found[key]) for key, value in plain.items())
    again = replace(
        dropped, output=tmp_path / "again", fit=replace(dropped.fit, output=tmp_path / "again-runs")
    )
    main(again)
    for key, value in factors(again, "plural").items():
        assert torch.equal(value, found[key])
    with pytest.raises(ValueError, match=r"dropout is 1\.0, expected 0 <= dropout < 1"):
        replace(config.experts[0], dropout=1.0)


def test_what_stands_and_where_it_goes_is_looked_at_before_any_training(config, tmp_path):
    (config.output / "past").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"past/adapter_config.json is missing"):
        main(config)
    file = config.held_out
    with pytest.raises(ValueError, match=r"output: .*rows.jsonl is a file, expected a folder"):
        main(replace(config, output=file))
    with pytest.raises(ValueError, match=r"fit.output: .*rows.jsonl is a file, expected a folder"):
        main(replace(config, fit=replace(config.fit, output=file)))
    with pytest.raises(ValueError, match=r"output and fit.output are both .*runs: an expert"):
        replace(config, output=config.fit.output)
    assert not config.fit.output.exists()


def test_a_run_is_not_resumed_with_other_rows_or_shown_otherwise(config):
    main(config)
    (config.output / "past").rename(config.output / "kept")
    with pytest.raises(ValueError, match=r"style was 'plain', is 'chat'"):
        main(replace(config, style="chat"))
    write_rows(config.held_out, ROWS[::-1])
    with pytest.raises(ValueError, match=r"data was '\w+', is '\w+'"):
        main(config)
    assert not (config.output / "past").exists()
