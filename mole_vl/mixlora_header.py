"""The config of a published MixLoRA adapter: adapter_config.json with `peft_type: MIXLORA`.

Held to MoE-PEFT's own reading of it. A field that changes the arithmetic and is not known here is
refused.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mole_vl.faults import refuse
from mole_vl.files import read_object
from mole_vl.fresh import Form
from mole_vl.gates import Choice, Switch, TopK, TopP
from mole_vl.mixlora import MixLoRA
from mole_vl.peft_folder import CONFIG

KIND = "MIXLORA"
TODAY = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
"""Today's names of layers by those that older versions have for them."""
STRATEGIES = {
    "mixlora": "mixlora",
    "mixtral": "mixlora",
    "mixlora-dynamic": "mixlora-dynamic",
    "mixlora-switch": "mixlora-switch",
    "switch": "mixlora-switch",
}
"""Today's names of routing strategies by all that they have had."""

_FORM = {"r", "lora_alpha", "lora_dropout", "use_rslora"}
_OWN = {
    "mixlora": {"top_k"},
    "mixlora-dynamic": {"top_p"},
    "mixlora-switch": {"expert_capacity"},
}
_ARITHMETIC = {"target_modules", "expert_lora", "routing_strategy", "num_experts", "act_fn"} | _FORM
# Fields that say how an adapter was trained or where it goes, not what it computes.
_HARMLESS = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "lora_init",
    "router_aux_loss_coef", "router_z_loss_coef", "router_loss", "router_init_range",
    "jitter_noise", "ffn_dropout",
}  # fmt: skip
_OF_EXPERTS = _FORM | {"peft_type", "target_modules", "lora_init"}


def read_header(folder: Path) -> tuple[MixLoRA, Mapping[str, Any]]:
    """The method that an adapter's config tells, and the config.

    What it does not tell of the training is MoE-PEFT's default. `targets` are today's names.

    Raises:
        FileNotFoundError: There is no config.
        ValueError: It is damaged, or of another kind; fields that are missing, out of range, or not
            known here.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {folder} is no published MixLoRA adapter")
    config = read_object(file)
    if config.get("peft_type") != KIND:
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}, expected {KIND!r}")
    strategy = STRATEGIES.get(str(config.get("routing_strategy")))
    faults = [*_faults_of_fields(config, strategy), *_faults_of_form(config, "")]
    own = config.get("expert_lora") or {}
    if not isinstance(own, dict):
        faults.append(f"expert_lora is {own!r}, expected settings by name")
    elif own:
        faults += _faults_of_form({**config, **own}, "expert_lora: ")
        faults += _unknown(own, _OF_EXPERTS, "expert_lora: ")
    refuse(str(file), faults)
    assert strategy is not None
    names: list[str] = config["target_modules"]
    targets = dict.fromkeys(TODAY.get(name, name) for name in names)
    switch = strategy == "mixlora-switch"
    method = MixLoRA(
        experts=config["num_experts"],
        choice=_choice(strategy, config),
        targets=tuple(targets),
        form=_form({**config, **own}),
        shared=_form(config),
        dropout=config.get("lora_dropout", 0.0),
        jitter=config.get("jitter_noise", 0.01 if switch else 0.0),
        spread=1.0 if switch else 0.02,
        z=0.001 if switch else 0.0,
    )
    return method, config


def _choice(strategy: str, config: Mapping[str, Any]) -> Choice:
    if strategy == "mixlora":
        return TopK(k=config.get("top_k", 2))
    if strategy == "mixlora-switch":
        return Switch(capacity=config.get("expert_capacity", 32))
    p = config.get("top_p", 0.8)
    # At 1 no share exceeds the sum, and all experts are taken.
    return TopP(p=p, renormalise=False) if p < 1 else TopK(k=config["num_experts"])


def _form(config: Mapping[str, Any]) -> Form:
    return Form(rank=config["r"], alpha=config["lora_alpha"], rslora=bool(config.get("use_rslora")))


def _faults_of_fields(config: Mapping[str, Any], strategy: str | None) -> Iterator[str]:
    known = _ARITHMETIC | _HARMLESS | _OWN.get(strategy or "", set())
    if strategy is None:
        given = config.get("routing_strategy")
        yield f"routing_strategy is {given!r}, expected one of {', '.join(STRATEGIES)}"
        known |= {name for names in _OWN.values() for name in names}
    yield from _unknown(config, known, "")
    if config.get("task_type") == "SEQ_CLS":
        yield "task_type is 'SEQ_CLS', whose head is none of a language model's"
    targets = config.get("target_modules")
    words = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not words or not targets:
        yield f"target_modules is {targets!r}, expected a list of names"
    for name, default in (("num_experts", None), ("top_k", 2), ("expert_capacity", 32)):
        yield from _whole(name, config.get(name, default))
    p = config.get("top_p", 0.8)
    if not _is_number(p) or not 0 < p <= 1:
        yield f"top_p is {p!r}, expected a number above 0, at most 1"
    jitter = config.get("jitter_noise", 0.0)
    if not _is_number(jitter) or not 0 <= jitter < 1:
        yield f"jitter_noise is {jitter!r}, expected 0 <= jitter_noise < 1"
    if not isinstance(config.get("act_fn"), str | None):
        yield f"act_fn is {config['act_fn']!r}, expected a name"


def _faults_of_form(config: Mapping[str, Any], where: str) -> Iterator[str]:
    yield from (f"{where}{fault}" for fault in _whole("r", config.get("r")))
    alpha: Any = config.get("lora_alpha")
    dropout: Any = config.get("lora_dropout", 0.0)
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        yield f"{where}lora_alpha is {alpha!r}, expected a positive number"
    if not _is_number(dropout) or not 0 <= dropout < 1:
        yield f"{where}lora_dropout is {dropout!r}, expected 0 <= lora_dropout < 1"


def _unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> Iterator[str]:
    """Fields that are in force and may change the arithmetic in ways that are not known here."""
    for name, value in config.items():
        if name in known or value in (None, False, 0, [], {}) or (name, value) == ("bias", "none"):
            continue
        why = ", whose magnitudes its files lack" if name == "use_dora" else ""
        yield f"{where}{name} = {value!r} is not supported{why}"


def _whole(name: str, value: object) -> Iterator[str]:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        yield f"{name} is {value!r}, expected a whole number, 1 or more"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
