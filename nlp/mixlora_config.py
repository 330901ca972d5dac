"""The training settings of m-LoRA and MoE-PEFT: one JSON file, its keys as spelt there.

    {"cutoff_len": 512, "save_step": 1000, "lora": [{"name": "mixlora", "data": ..., ...}, ...]}

Each entry of `lora` is an adapter: MixLoRA with a `routing_strategy`, an ordinary LoRA without. A
key of another version is read in that version's sense: `w1_proj` and its kin, `mixtral`, `switch`.
Keys that have no meaning here are told (`MixLoRASettings.unused`) or, where another value than the
usual one would change what is learned, refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole_vl.faults import at_least, refuse
from mole_vl.files import check_file, read_object
from nlp.keys import values_of
from nlp.mixlora_adapter import AdapterSettings, ExpertForm

# What may be given without any effect, and why it has none.
_ONE_BY_ONE = "adapters are trained and asked one after the other"
_UNUSED = {
    "train_strategy": _ONE_BY_ONE,
    "train_lora_simultaneously_num": _ONE_BY_ONE,
    "train_lora_candidate_num": _ONE_BY_ONE,
    "inference_lora_simultaneously_num": _ONE_BY_ONE,
    "eval_lora_simultaneously_num": _ONE_BY_ONE,
    "eval_rollback_retrying_steps": _ONE_BY_ONE,
    "early_stop_test_step": "it had none there either",
}
# What may be given with one value alone, and why.
_ALONE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "optim": (("adamw",), "there is no other optimiser here"),
    "momentum": ((0,), "it is for sgd"),
    "loraplus_lr_ratio": ((1,), "all factors have one learning rate"),
    "group_by_length": ((False,), "each epoch draws its rows in an order of its own"),
    "expand_side": (("right",), "rows are padded on the right"),
    "evaluate_steps": ((), "adapters are judged by --evaluate when they are trained"),
    "router_profile": ((False,), "it is no part of training"),
    "svd_analysis": ((False,), "it is no part of training"),
    "lora_init": (("original",), "A starts as torch's linear layers do"),
    "temperature": ((0,), "it would divide the shares after the softmax"),
    "ffn_dropout": ((0,), "dropout is of the factors alone"),
    "sparse_step": ((), "every layer has its experts"),
    "router_dyn_loss_coef": ((0,), "there is no entropy loss here"),
    "entropy_index": ((), "there is no entropy loss here"),
    "entropy_type": ((), "there is no entropy loss here"),
    "entropy_eps": ((), "there is no entropy loss here"),
}
_OF_EXPERTS = ("lora_init",)


@dataclass(frozen=True, kw_only=True)
class MixLoRASettings:
    """A file of settings.

    Args:
        lora: The adapters.
        cutoff_len: The most tokens of a row: what comes behind is cut off; -1 for as many as the
            base reads.
        save_step: Micro batches between checkpoints.
        evaluate_result: Where the results of judging are written.
        unused: Keys of the file without any effect, and why.
    """

    lora: tuple[AdapterSettings, ...]
    cutoff_len: int
    save_step: int
    evaluate_result: Path | None = None
    unused: Mapping[str, str]

    def __post_init__(self) -> None:
        names = [one.name for one in self.lora]
        twice = sorted({name for name in names if names.count(name) > 1})
        refuse(
            "settings",
            [
                f"two adapters are called {', '.join(twice)}" if twice else None,
                None if self.cutoff_len == -1 else at_least("cutoff_len", self.cutoff_len, 2),
                at_least("save_step", self.save_step, 1),
            ],
        )


def read_settings(file: Path) -> MixLoRASettings:
    """The settings in a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No JSON; unknown keys, each with the known one that it is most like; keys that
            are missing; values of another kind, out of range, or that cannot be followed here. All
            of them at once.
    """
    check_file("config", file, "a JSON file of settings")
    given = read_object(file)
    unused = {key: why for key, why in _UNUSED.items() if given.get(key) is not None}
    outer = {key: value for key, value in given.items() if key not in {"lora", *_UNUSED}}
    values, faults = values_of(outer, MixLoRASettings, aside=("lora", "unused"))
    entries = given.get("lora")
    if not isinstance(entries, list) or not entries:
        entries = []
        faults.append(f"lora is {given.get('lora')!r}, expected a list of adapters")
    read = [_adapter(one, f"lora[{number}].") for number, one in enumerate(entries)]
    adapters = tuple(found for found, _ in read if found is not None)
    settings = None
    if not faults:
        try:
            settings = MixLoRASettings(**values, lora=adapters, unused=unused)
        except ValueError as fault:
            faults.append(str(fault))
    refuse(str(file), [*faults, *(fault for _, odd in read for fault in odd)])
    assert settings is not None
    return settings


def _adapter(given: Any, where: str) -> tuple[AdapterSettings | None, Sequence[str]]:
    """An entry of `lora`, or None; and all its faults."""
    if not isinstance(given, dict):
        return None, [f"{where[:-1]} is {given!r}, expected keys with values"]
    own = given.get("expert_lora")
    kept, faults = _kept(given, _ALONE, where)
    kept = {key: value for key, value in kept.items() if key != "expert_lora"}
    values, odd = values_of(kept, AdapterSettings, where, aside=("expert_lora",))
    faults += odd
    if isinstance(own, dict):
        inner, odd = _kept(own, _OF_EXPERTS, f"{where}expert_lora.")
        found, more = values_of(inner, ExpertForm, f"{where}expert_lora.")
        faults += [*odd, *more]
        values["expert_lora"] = ExpertForm(**found) if not more else None
    elif own is not None:
        faults.append(f"{where}expert_lora is {own!r}, expected keys with values")
    if faults:
        return None, faults
    try:
        return AdapterSettings(**values), []
    except ValueError as fault:
        return None, [f"{where[:-1]} {fault}"]


def _kept(
    given: Mapping[str, Any], alone: Sequence[str] | Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[str]]:
    """What is given without the keys that have one value alone, and those that have another."""
    faults = []
    for key, value in given.items():
        if key in alone and value is not None and value not in _ALONE[key][0]:
            only = " or ".join(map(repr, _ALONE[key][0])) or "no value"
            faults.append(f"{where}{key} is {value!r}, expected {only}: {_ALONE[key][1]}")
    return {key: value for key, value in given.items() if key not in alone}, faults
