"""diffusers' own LoRA format: today's, with peft's keys and config, and the older ones."""

import json
import re
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_peft
from torch import Tensor

from dreambooth.lora_pairs import COMPONENTS, is_path, pair_factors
from mole_vl.experts import Expert, Factors
from mole_vl.peft_folder import check_config, layers_by_config, peft_config, peft_tensors

_KEY = re.compile(r"(?P<path>.+)\.(?:lora_(?P<letter>[AB])(?:\.default)?\.weight|(?P<alpha>alpha))")


def diffusers_layers(
    tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], where: str
) -> dict[str, dict[str, Factors]]:
    """Factors by component and path from a file's tensors and its header's configs.

    Scales are those of the component's config; without one, alpha / rank where the file has an
    alpha, and otherwise 1, as diffusers takes it.

    Raises:
        ValueError: A key that is not known, half a pair, a config of other arithmetic.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        component, path, part = _place(key, where)
        parts = found.setdefault(component, {}).setdefault(path, {})
        if part in parts:
            raise ValueError(f"{where}: {key!r} names {component}'s {path} a second time")
        parts[part] = tensor
    layers = {}
    for component, pairs in found.items():
        inside = f"{where}: {component}"
        if component not in configs:
            layers[component] = {
                path: pair_factors(parts, f"{inside}.{path}") for path, parts in pairs.items()
            }
            continue
        if any("alpha" in parts for parts in pairs.values()):
            raise ValueError(f"{inside} has alphas both as keys and in {LORA_ADAPTER_METADATA_KEY}")
        check_config(configs[component], f"{inside}'s {LORA_ADAPTER_METADATA_KEY}")
        layers[component] = layers_by_config(pairs, configs[component], inside)
    return layers


def diffusers_tensors(
    experts: Mapping[str, Expert],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and header for experts by component."""
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, expert in experts.items():
        if component != "unet":
            # transformers 4 and other programs have `text_model.`; where a model has none,
            # diffusers drops it.
            bare = {path: path.removeprefix("text_model.") for path in expert.layers}
            full = {p: f"text_model.{b}" for p, b in bare.items() if b.startswith("encoder.")}
            stored = peft_tensors(expert.renamed(full))
            fields = _suffixes(peft_config(expert.renamed(bare)))
        else:
            stored, fields = peft_tensors(expert), peft_config(expert)
        tensors |= {f"{component}.{key}": tensor for key, tensor in stored.items()}
        config |= {f"{component}.{field}": value for field, value in fields.items()}
    return tensors, {LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def _suffixes(config: dict[str, Any]) -> dict[str, Any]:
    # diffusers drops `text_model.` from the keys alone: patterns must match with and without it.
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = {path.removeprefix("^"): value for path, value in config[field].items()}
    return config


def diffusers_configs(header: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """The header's configs, which are peft's, by component.

    Raises:
        ValueError: What it holds is no JSON, or no table.
    """
    try:
        fields = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {LORA_ADAPTER_METADATA_KEY} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {LORA_ADAPTER_METADATA_KEY} is no table of settings")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, _, field = key.rpartition(".")
        configs.setdefault(component or "unet", {})[field] = value
    return configs


def _place(key: str, where: str) -> tuple[str, str, str]:
    """Component, path and part (A, B, alpha) of a key in today's or an older form."""
    component, _, rest = key.partition(".")
    if component not in COMPONENTS:
        # `save_attn_procs` and `save_lora_adapter` write the UNet's without a prefix.
        component, rest = "unet", key
    found = _KEY.fullmatch(_in_peft_names(component, rest))
    if found is None or not is_path(component, found["path"]):
        raise ValueError(
            f"{where}: the key {key!r} is not used; expected LoRA factors of "
            f"{', '.join(COMPONENTS)}, such as unet.PATH.lora_A.weight"
        )
    return component, found["path"], found["letter"] or "alpha"


def _in_peft_names(component: str, key: str) -> str:
    stem, dot, last = key.rpartition(".")
    if last == "alpha":
        # An alpha stands at the layer's path, or at what the older forms made of it.
        paired = f"{stem.removesuffix('.down.weight').removesuffix('.lora')}"
        paired += ".down.weight" if paired.endswith("_lora") else ".lora.down.weight"
        return _in_peft_names(component, paired).removesuffix(".lora_A.weight") + dot + last
    if component == "unet":
        return next(iter(convert_unet_state_dict_to_peft({key: None})))
    # The text encoders' forms have their own names for the same layers.
    key = re.sub(r"(?<!text_projection)\.lora\.(down|up)", r".lora_linear_layer.\1", key)
    for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        key = next(iter(convert_state_dict_to_peft({key: None}, kind)))
    return key
