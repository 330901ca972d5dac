"""PEFT's folders: adapter_config.json and adapter_model.safetensors, read and written.

Read without peft, so that nothing of transformers comes in; a test holds the result against
peft's own. A field of the config that changes the arithmetic and is not known here is refused.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mole_vl.experts import Expert, Factors
from mole_vl.files import new_folder, parse_object, parse_tensors, read_object, read_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<letter>[AB])(\.default)?\.weight$")
_MAGNITUDE = re.compile(r"^(?P<path>.+)\.lora_magnitude_vector(\.default)?(\.weight)?$")

# Fields that say how an adapter was trained or where it goes, not what it computes. Among them how
# the base's weight lies (fan_in_fan_out): the factors are the same for both.
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config",
    "loftq_config", "corda_config", "lora_ga_config", "runtime_config", "fan_in_fan_out",
}  # fmt: skip
_ARITHMETIC = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
}  # fmt: skip
# Initialisations that leave the base as it is. The others move a part of the base into the
# adapter, so that it fits no base but the one changed with it.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def read_peft(folder: str | Path, name: str | None = None) -> Expert:
    """Read one expert from a PEFT LoRA folder.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.
        name: The expert's name; the folder's if not given.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A damaged file, a config that this arithmetic does not cover, factors that do
            not agree with the config, NaN; the message names file and key.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    return _expert(config, tensors, name or folder.resolve().name, str(folder))


def read_peft_contents(contents: Mapping[str, bytes], name: str, where: str) -> Expert:
    """Read one expert from the contents of a PEFT LoRA folder's two files, by their names.

    Raises:
        ValueError: As of `read_peft`.
    """
    config = parse_object(contents[CONFIG], f"{where}/{CONFIG}")
    check_config(config, f"{where}/{CONFIG}", dora=True)
    return _expert(config, parse_tensors(contents[WEIGHTS], f"{where}/{WEIGHTS}"), name, where)


def _expert(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, where: str
) -> Expert:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(_PREFIX)
        if magnitude := _MAGNITUDE.match(path):
            pairs.setdefault(magnitude["path"], {})["magnitude"] = tensor.flatten()
            continue
        found = _KEY.match(path)
        if found is None:
            raise ValueError(
                f"{where}/{WEIGHTS}: the key {key!r} is no LoRA factor; "
                "expected keys such as base_model.model.PATH.lora_A.weight"
            )
        pairs.setdefault(found["path"], {})[found["letter"]] = tensor
    layers = layers_by_config(pairs, config, f"{where}/{WEIGHTS}")
    return Expert(name, layers, config.get("base_model_name_or_path"), where)


def trained_expert(model: nn.Module, name: str, base: str | None = None) -> Expert:
    """The expert in a model under peft's LoRA, as it is trained now; paths are the base model's.

    Args:
        model: The base model whose layers peft has replaced (`get_base_model()`).
        name: The expert's name.
        base: The base model's name.
    """
    layers = {}
    for path, module in model.named_modules():
        pairs, scales = getattr(module, "lora_A", None), getattr(module, "scaling", None)
        if isinstance(pairs, nn.ModuleDict) and scales and "default" in pairs:
            a, b = (module.get_submodule(f"lora_{letter}.default").weight for letter in "AB")
            vectors: Any = getattr(module, "lora_magnitude_vector", {})
            magnitude = vectors["default"].weight.detach() if "default" in vectors else None
            layers[path] = Factors(a.detach(), b.detach().flatten(1), scales["default"], magnitude)  # pyright: ignore
    return Expert(name, layers, base)


def read_components(folder: str | Path, name: str | None = None) -> dict[str, Expert]:
    """Read an expert's parts from a folder of PEFT folders (`unet/`, `text_encoder/`).

    Returns:
        The expert of each component; the empty component for a plain PEFT folder.

    Raises:
        FileNotFoundError: Neither the folder nor its children are PEFT folders.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    if (folder / CONFIG).exists():
        return {"": read_peft(folder, name)}
    parts = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not parts:
        raise FileNotFoundError(
            f"{folder}: no {CONFIG} in it or in its folders; expected a PEFT LoRA folder or a "
            "folder of them by component"
        )
    return {part.name: read_peft(part, name) for part in parts}


def write_peft(
    expert: Expert,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an expert as a PEFT LoRA folder, in one rename; an older folder there is replaced.

    Args:
        expert: Ranks and scales may differ by layer: they become rank_pattern and alpha_pattern.
        folder: Where to.
        dtype: Type of the stored factors; their own if not given, and that of a DoRA's magnitudes.
        metadata: More entries of the header of adapter_model.safetensors.
    """
    with new_folder(Path(folder)) as partial:
        for name, content in peft_contents(expert, dtype, metadata).items():
            (partial / name).write_bytes(content)


def peft_contents(
    expert: Expert,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """The contents of an expert's PEFT folder by the names of its files; as of `write_peft`."""
    tensors = {f"{_PREFIX}{key}": tensor for key, tensor in peft_tensors(expert, dtype).items()}
    config = json.dumps(peft_config(expert), indent=2) + "\n"
    return {
        CONFIG: config.encode(),
        WEIGHTS: save(tensors, metadata={**(metadata or {}), "format": "pt"}),
    }


def peft_tensors(expert: Expert, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The factors by peft's keys, `PATH.lora_A.weight`, a convolution's both of four dimensions."""
    tensors = {}
    for path, factors in expert.layers.items():
        b = factors.b if factors.a.dim() == 2 else factors.b[:, :, None, None]
        named = {"lora_A.weight": factors.a, "lora_B.weight": b}
        if factors.magnitude is not None:
            named["lora_magnitude_vector"] = factors.magnitude
        for name, factor in named.items():
            # A magnitude's rounding would rescale the base itself.
            kept = factor.dtype if dtype is None or factor is factors.magnitude else dtype
            stored = factor.detach().cpu().to(kept).contiguous()
            tensors[f"{path}.{name}"] = stored
    return tensors


def peft_config(expert: Expert) -> dict[str, Any]:
    """The fields of adapter_config.json that make peft compute what the expert does."""
    ranks = {path: factors.rank for path, factors in expert.layers.items()}
    alphas = {path: factors.scale * factors.rank for path, factors in expert.layers.items()}
    # The most frequent are the defaults: a pattern is matched against every layer.
    rank, alpha = (Counter(by.values()).most_common(1)[0][0] for by in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": expert.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exact(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {_exact(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": sorted(expert.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        **({"use_dora": True} if _is_dora(expert) else {}),
    }


def _is_dora(expert: Expert) -> bool:
    """Whether all layers of an expert are DoRAs, or none.

    Raises:
        ValueError: Some are: peft's format has one word for all.
    """
    kinds = {factors.magnitude is not None for factors in expert.layers.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"expert {expert.name!r} is a DoRA on some layers and a LoRA on others, which peft's "
            "format cannot say"
        )
    return kinds == {True}


def _exact(path: str) -> str:
    # PEFT matches a pattern against the end of a module's path: anchor it, and quote its dots.
    return "^" + re.escape(path)


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        advice = f", but one of them by component ({', '.join(parts)}): call read_components"
        raise FileNotFoundError(
            f"{file} is missing: {folder} is no PEFT LoRA folder{advice if parts else ''}"
        )
    config = read_object(file)
    check_config(config, str(file), dora=True)
    return config


def check_config(config: Any, where: str, *, dora: bool = False) -> None:
    """Raise ValueError unless this is the config of a LoRA whose arithmetic is known here.

    Args:
        config: What adapter_config.json holds.
        where: Where it was read, for messages.
        dora: Whether it may be a DoRA's.
    """
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{where}: peft_type is {kind!r}, expected 'LORA'")
    active = {key: value for key, value in config.items() if value not in (None, False, [], {})}
    faults = [
        f"{key} = {value!r} is not supported: train the LoRA without it"
        for key, value in active.items()
        if key not in _HARMLESS | _ARITHMETIC and not (dora and key == "use_dora")
    ]
    if config.get("bias", "none") != "none":
        faults.append(f"bias = {config['bias']!r}, expected 'none': train the LoRA without biases")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        faults.append(f"init_lora_weights = {start!r} changes the base; convert it to plain LoRA")
    for key, pattern, kind in (
        ("r", "rank_pattern", int),
        ("lora_alpha", "alpha_pattern", int | float),
    ):
        given: Any = config.get(pattern) or {}
        if not isinstance(given, dict):
            faults.append(f"{pattern} = {given!r}, expected numbers by ends of paths")
            given = {}
        numbers = {key: config.get(key), **{f"{pattern}[{end!r}]": v for end, v in given.items()}}
        faults += [
            f"{name} = {value!r}, expected a positive number"
            for name, value in numbers.items()
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf
        ]
        faults += [
            f"{pattern}[{end!r}] is no pattern: {why}" for end in given if (why := _odd(end))
        ]
    if faults:
        raise ValueError(f"{where}: " + "; ".join(faults))


def _odd(pattern: str) -> str | None:
    """What is wrong with a regular expression, or None."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def _read_tensors(folder: Path) -> Mapping[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.exists():
            raise ValueError(
                f"{pickled} is a pickle, which can run code when it is read; convert it to "
                f"{WEIGHTS} where you trust it"
            )
        raise FileNotFoundError(f"{file} is missing: copy it there, beside {CONFIG}")
    return read_tensors(file)


def layers_by_config(
    pairs: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], where: str
) -> dict[str, Factors]:
    """Factors by path from pairs of tensors {"A": ..., "B": ...} and the config that scales them.

    Beside a DoRA's pair stands its "magnitude".

    Raises:
        ValueError: Half a pair, or one that does not agree with the config.
    """
    return {path: _factors(f"{where}: {path}", path, pair, config) for path, pair in pairs.items()}


def _factors(
    where: str, path: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Factors:
    if not {"A", "B"} <= set(pair):
        found = ", ".join(f"lora_{name}" for name in pair)
        raise ValueError(f"{where} has {found} alone, expected A and B")
    if bool(config.get("use_dora")) != ("magnitude" in pair):
        said = "is a DoRA's by its config and has no" if config.get("use_dora") else "has a"
        raise ValueError(f"{where} {said} lora_magnitude_vector, which use_dora must agree with")
    a, b = pair["A"], pair["B"]
    rank = _pattern(config.get("rank_pattern"), path, config["r"])
    convolves = a.dim() == b.dim() == 4 and b.shape[2:] == (1, 1)
    if not (convolves or a.dim() == b.dim() == 2) or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}, expected rank "
            f"{rank}: ({rank}, in) and (out, {rank}), or a convolution's ({rank}, in, h, w) and "
            f"(out, {rank}, 1, 1)"
        )
    alpha = _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factors(a, b.flatten(1), scale, pair.get("magnitude"))


def _pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a path, as peft reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
