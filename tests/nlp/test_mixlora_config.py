"""The settings of MixLoRA adapters, in the keys of m-LoRA and MoE-PEFT."""

import json
from pathlib import Path

import pytest

from mole_vl.gates import Switch, TopK, TopP
from mole_vl.mixlora import Form
from nlp.mixlora_config import read_settings
from nlp.train_experts import LoRA

PARTS = {
    "q_proj": True, "k_proj": False, "v_proj": True, "o_proj": False,
    "w1_proj": True, "w2_proj": True, "w3_proj": True,
}  # fmt: skip
ATTENTION = {name: on and "_proj" in name and name[0] != "w" for name, on in PARTS.items()}
COMMON = {
    "optim": "adamw", "lr": 1e-5, "batch_size": 16, "micro_batch_size": 2, "test_batch_size": 64,
    "num_epochs": 3, "r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
    "data": "yahma/alpaca-cleaned", "prompt": "template/alpaca.json", "group_by_length": False,
    "expand_side": "right",
}  # fmt: skip
# config/alpaca_mixlora.json of m-LoRA, that the README's commands name.
SEED = {
    "cutoff_len": 256, "save_step": 2000, "early_stop_test_step": 2000,
    "train_lora_candidate_num": 3, "train_lora_simultaneously_num": 3, "train_strategy": "optim",
    "lora": [
        {"name": "lora_0", **COMMON, "target_modules": ATTENTION},
        {"name": "lora_1", **COMMON, "target_modules": PARTS,
         "routing_strategy": "mixtral", "num_experts": 8, "act_fn": "silu"},
        {"name": "lora_2", **COMMON, "target_modules": PARTS, "routing_strategy": "switch",
         "expert_capacity": 96, "num_experts": 8, "act_fn": "gelu_new"},
    ],
}  # fmt: skip
# templates/mixlora.json of MoE-PEFT.
NEWER = {
    "cutoff_len": 512, "save_step": 1000, "train_lora_candidate_num": 2,
    "train_lora_simultaneously_num": 2, "train_strategy": "optim",
    "lora": [{
        "name": "mixlora", "task_name": "", "optim": "adamw", "scheduler_type": "constant",
        "warmup_steps": 0, "lr": 2e-4, "batch_size": 16, "micro_batch_size": 8,
        "evaluate_batch_size": 16, "num_epochs": 2, "r": 16, "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": dict.fromkeys(
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"), True),
        "routing_strategy": "mixlora", "num_experts": 8, "top_k": 2, "group_by_length": False,
    }],
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """Reads settings, those of the one adapter changed; without a value a key is left out."""

    def read(given=None, outer=None, **changes):
        (entry,) = NEWER["lora"]
        one = {"data": "rows.json", **entry, **changes}
        one = {key: value for key, value in one.items() if value is not ...}
        file = tmp_path / "file.json"
        file.write_text(json.dumps(given or {**NEWER, "lora": [one], **(outer or {})}))
        return read_settings(file)

    return read


def test_the_readmes_file_is_read_as_it_is_spelt(read):
    settings = read(SEED)
    assert (settings.cutoff_len, settings.save_step) == (256, 2000)
    assert set(settings.unused) == set(SEED) - {"cutoff_len", "save_step", "lora"}
    plain, mixed, switch = settings.lora
    lora = LoRA(name="lora_0", rank=8, alpha=16, targets=("q_proj", "v_proj"), dropout=0.05)
    assert plain.lora == lora
    assert plain.strategy is None
    for one in (mixed, switch):
        assert one.targets == ("q_proj", "v_proj", "gate_proj", "down_proj", "up_proj")
        assert one.method.form == one.method.shared == Form(rank=8, alpha=16)
        assert (one.prompt, one.test_rows, one.held_out) == ("template/alpaca.json", 64, 0)
    assert mixed.method.choice == TopK(k=2)
    assert (mixed.method.jitter, mixed.method.spread, mixed.method.z) == (0.0, 0.02, 0.0)
    assert switch.method.choice == Switch(capacity=96)
    assert (switch.method.jitter, switch.method.spread, switch.method.z) == (0.01, 1.0, 0.001)
    assert (mixed.method.balance, mixed.method.dropout, mixed.method.experts) == (0.001, 0.05, 8)
    assert (mixed.act_fn, switch.act_fn) == ("silu", "gelu_new")


def test_the_repositorys_own_file_is_in_order():
    settings = read_settings(Path(__file__).parents[2] / "configs/alpaca_mixlora.json")
    assert [one.strategy for one in settings.lora] == [None, "mixlora", "mixlora-switch"]
    assert not settings.unused


def test_strategies_have_their_own_keys(read):
    dynamic = {"routing_strategy": "mixlora-dynamic", "top_k": ..., "temperature": 0}
    assert read(**dynamic).lora[0].method.choice == TopP(p=0.8)
    assert read(**dynamic, top_p=0.5).lora[0].method.choice == TopP(p=0.5)
    assert read(**dynamic, top_p=1).lora[0].method.choice == TopK(k=8)
    quiet = read(router_loss=False, jitter_noise=0.2, router_init_range=0.5).lora[0].method
    assert (quiet.balance, quiet.jitter, quiet.spread) == (0.0, 0.2, 0.5)
    loud = read(router_aux_loss_coef=1, expert_lora={"r": 4, "use_rslora": True}).lora[0].method
    assert loud.balance == 1
    assert loud.form == Form(rank=4, alpha=32, rslora=True)
    assert loud.shared == Form(rank=16, alpha=32)
    switch = {"routing_strategy": "switch", "top_k": ..., "router_z_loss_coef": 0.5}
    assert read(**switch).lora[0].method.z == 0.5
    assert read(**switch, router_loss=True).lora[0].method.choice == Switch(capacity=32)
    plain = {"routing_strategy": ..., "num_experts": ..., "top_k": ...}
    found = read(**plain, use_rslora=True, peft_type="LORA").lora[0].lora
    assert found.alpha / found.rank == pytest.approx(32 / 4)


def test_the_training_loop_is_what_the_keys_say(read, tmp_path):
    def fit(rows=100, save_step=1000, **changes):
        return read(**changes).lora[0].fit(tmp_path, rows, save_step=save_step, seed=7)

    run = fit(num_epochs=3, weight_decay=0.1, save_step=7)
    assert (run.steps, run.rows, run.micro_rows, run.save_every) == (19, 16, 8, 4)
    assert (run.lr, run.schedule, run.warmup, run.clip) == (2e-4, "constant", 0, None)
    assert (run.weight_decay, run.seed, run.output) == (0.1, 7, tmp_path)
    assert fit(micro_batch_size=...).micro_rows == 16
    assert fit(warmup_steps=5, scheduler_type="constant_with_warmup").warmup == 5
    assert fit(warmup_steps=0.5, scheduler_type="linear").warmup == 6
    cosine = fit(warmup_ratio=0.25, warmup_steps=..., scheduler_type="cosine")
    assert (cosine.warmup, cosine.schedule) == (3, "cosine")
    assert fit(weight_decay=...).weight_decay == 0.01


def test_targets_may_be_a_list(read):
    (one,) = read(target_modules=["w1_proj", "gate_proj", "o_proj"]).lora
    assert one.targets == ("gate_proj", "o_proj")


def test_all_faults_are_reported_together(read):
    entry = {**NEWER["lora"][0], "data": "rows.json"}
    given = {
        "cutof_len": 1, "save_step": "often",
        "lora": [
            {**entry, "learning_rate": 1, "r": 1.5, "num_epochs": None, "temperature": 2},
            {**entry, "name": "a/b", "batch_size": 6, "micro_batch_size": 4, "top_k": 0},
            7,
        ],
    }  # fmt: skip
    expected = (
        r"file.json: unknown key cutof_len; the nearest known one is cutoff_len; "
        r"save_step is 'often', expected a number \(int\); cutoff_len has no value; "
        r"lora\[0\].temperature is 2, expected 0: it would divide the shares after the softmax; "
        r"lora\[0\].r is 1.5, expected a number \(int\); "
        r"unknown key lora\[0\].learning_rate; the nearest known one is .*; "
        r"lora\[0\].num_epochs has no value; "
        r"lora\[1\] a/b: name is 'a/b', expected a plain word.*; "
        r"micro_batch_size is 4, which does not divide 6 rows; top_k is 0, expected at least 1; "
        r"lora\[2\] is 7, expected keys with values$"
    )
    with pytest.raises(ValueError, match=expected):
        read(given)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"cutoff_len": 0}, "settings: cutoff_len is 0, expected at least 2"),
        ({"save_step": 0}, "save_step is 0, expected at least 1"),
        ({"lora": []}, r"lora is \[\], expected a list of adapters"),
        ({"lora": {"name": "a"}}, r"lora is .*, expected a list of adapters"),
        ({"unused": {}}, "unknown key unused"),
        ({"evaluate_result": 3}, "evaluate_result is 3, expected a path"),
    ],
)
def test_outer_keys_that_do_not_hold_are_told(read, outer, message):
    with pytest.raises(ValueError, match=message) as refused:
        read(outer=outer)
    assert "\n" not in str(refused.value)


def test_two_adapters_of_one_name_are_told(read):
    entry = {**NEWER["lora"][0], "data": "rows.json"}
    with pytest.raises(ValueError, match="two adapters are called mixlora"):
        read({**NEWER, "lora": [entry, entry]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "runs"}, "name is 'runs', which is the folder of the runs"),
        ({"data": ""}, "data is empty, expected a JSON file or a Hub id"),
        ({"data": ...}, r"lora\[0\].data has no value"),
        ({"task_name": "arc-e"}, "task_name is 'arc-e', expected 'causal': hand its rows to data"),
        ({"optim": "sgd", "momentum": 0.9}, "optim is 'sgd', expected 'adamw'.*momentum is 0.9, e"),
        ({"scheduler_type": "polynomial"}, "scheduler_type is 'polynomial', expected 'constant' o"),
        ({"loraplus_lr_ratio": 4}, "loraplus_lr_ratio is 4, expected 1: all factors have one lear"),
        ({"group_by_length": True}, "group_by_length is True, expected False: each epoch draws"),
        ({"expand_side": "left"}, "expand_side is 'left', expected 'right'"),
        ({"evaluate_steps": 10}, "evaluate_steps is 10, expected no value: adapters are judged by"),
        ({"svd_analysis": True}, "svd_analysis is True, expected False"),
        ({"lora_init": "gaussian"}, "lora_init is 'gaussian', expected 'original'"),
        ({"temperature": 0.5}, "temperature is 0.5, expected 0"),
        ({"ffn_dropout": 0.1}, "ffn_dropout is 0.1, expected 0"),
        ({"sparse_step": 2}, "sparse_step is 2, expected no value: every layer has its experts"),
        ({"router_dyn_loss_coef": 0.01}, "router_dyn_loss_coef is 0.01, expected 0: there is no e"),
        ({"entropy_type": "renyi"}, "entropy_type is 'renyi', expected no value"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio and warmup_steps are both given"),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5, expected a whole number or a share"),
        ({"warmup_ratio": 2}, "warmup_ratio is 2.0, expected 0 <= warmup_ratio < 1"),
        ({"val_set_size": 1.5}, "val_set_size is 1.5, expected a number of rows, a share, or -1"),
        ({"val_set_size": float("inf")}, "val_set_size is inf, expected a number of rows, a share"),
        ({"val_set_size": float("nan")}, "val_set_size is nan, expected a number of rows, a share"),
        ({"warmup_steps": float("inf")}, "warmup_steps is inf, expected at least 0"),
        ({"val_set_size": 5, "test_data": "a.json"}, "test_data and val_set_size are both given"),
        ({"lora_dropout": 1}, "lora_dropout is 1.0, expected 0 <= lora_dropout < 1"),
        ({"target_modules": {"q_proj": False}}, "target_modules names no layer that is to get"),
        ({"target_modules": "q_proj"}, "expected true or false by name or a list of names"),
        ({"routing_strategy": "mola"}, "routing_strategy is 'mola', expected one of mixlora, mixt"),
        ({"routing_strategy": ..., "peft_type": "MIXLORA"}, "routing_strategy has no value, expec"),
        ({"routing_strategy": ...}, "num_experts is given without a routing_strategy, which"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA', expected 'MIXLORA' beside"),
        ({"num_experts": ...}, "num_experts has no value"),
        ({"num_experts": 0}, "num_experts is 0, expected at least 1"),
        ({"top_p": 0.5}, "top_p is for mixlora-dynamic, and this is mixlora"),
        ({"expert_capacity": 5}, "expert_capacity is for mixlora-switch, and this is mixlora"),
        ({"routing_strategy": "mixlora-dynamic", "top_k": ..., "top_p": 2}, "top_p is 2.0, expect"),
        ({"router_loss": False, "router_aux_loss_coef": 0.1}, "is 0.1, and router_loss is false"),
        ({"router_init_range": 0}, "router_init_range is 0.0, expected a positive number"),
        ({"jitter_noise": 1}, "jitter_noise is 1.0, expected 0 <= jitter_noise < 1"),
        ({"expert_lora": 3}, r"lora\[0\].expert_lora is 3, expected keys with values"),
        ({"expert_lora": {"r": 0, "lora_dropout": 0.5}}, "expert_lora.r is 0, .*expert_lora.lora_"
         "dropout is 0.5, expected the adapter's own, 0.05"),
        ({"expert_lora": {"rank": 3}}, "unknown key .*expert_lora.rank; the nearest known one is "),
        ({"expert_lora": {"lora_init": "gaussian"}}, "expert_lora.lora_init is 'gauss"),
        ({"use_dora": "maybe"}, "use_dora is 'maybe', expected true or false"),
    ],
)  # fmt: skip
def test_keys_that_do_not_hold_are_told(read, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        read(**changes)
    assert "\n" not in str(refused.value)


def test_what_is_no_settings_file_is_refused(tmp_path):
    file = tmp_path / "file.json"
    with pytest.raises(FileNotFoundError, match=r"config: .*is no file, expected a JSON file of "):
        read_settings(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_settings(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        read_settings(file)
