"""LoRA files of text-to-image models: PEFT's, diffusers' and kohya's, read and written."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME,
    LORA_WEIGHT_NAME_SAFE,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreambooth.diffusers_lora import diffusers_configs, diffusers_layers, diffusers_tensors
from dreambooth.kohya import is_kohya, kohya_parts, kohya_tensors
from dreambooth.lora_pairs import COMPONENTS, pair_factors, refuse_other_methods
from mole_vl.experts import Expert, Factors
from mole_vl.faults import one_of, refuse
from mole_vl.files import new_file, new_folder
from mole_vl.peft_folder import CONFIG, read_components, write_peft

Form = Literal["peft", "diffusers", "kohya"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_BASE = "base_model_name_or_path"
# Captions hold many tags; the first few are what a LoRA is called by.
_TAGS = 5


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Args:
        experts: One expert's parts by component (unet, text_encoder, text_encoder_2); their paths
            are the file's (see `dreambooth.adapter.fitted_to`).
        triggers: Words that call it, from kohya's header: the trigger phrase, or else the most
            frequent tags of its captions.
        form: The format.
    """

    experts: Mapping[str, Expert]
    triggers: tuple[str, ...]
    form: Form


def read_lora(
    path: str | Path, name: str | None = None, *, unet_config: Mapping[str, Any] | None = None
) -> LoraFile:
    """Read a LoRA: a PEFT folder, a folder of them by component, or diffusers' or kohya's file.

    Args:
        path: A PEFT folder is the UNet's. Of a folder, diffusers' pytorch_lora_weights.safetensors
            is read.
        name: The expert's name; the file's or folder's if not given.
        unet_config: The UNet's config, needed for SDXL LoRAs in sgm names (`input_blocks_4_1_...`).

    Raises:
        FileNotFoundError: No LoRA is there.
        ValueError: A pickle, a damaged file, no LoRA, another method than plain LoRA, a key that
            is not used, NaN; the message names file and key.
    """
    path = Path(path)
    if path.is_dir() and not (path / LORA_WEIGHT_NAME_SAFE).exists():
        return _read_folder(path, name)
    file = path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path
    if file.suffix in _PICKLES:
        raise _pickled(file)
    tensors, header = _read_file(file)
    where = str(file)
    refuse_other_methods(tensors, where)
    form: Form = "kohya" if any(map(is_kohya, tensors)) else "diffusers"
    bases: dict[str, str | None] = dict.fromkeys(COMPONENTS, header.get("ss_sd_model_name"))
    if form == "kohya":
        layers = {
            component: {p: pair_factors(v, f"{where}: {component}.{p}") for p, v in parts.items()}
            for component, parts in kohya_parts(tensors, where, unet_config).items()
        }
    else:
        configs = diffusers_configs(header, where)
        layers = diffusers_layers(tensors, configs, where)
        bases |= {part: config.get(_BASE) for part, config in configs.items()}
    # Every file of diffusers' has the same name.
    stem = file.resolve().parent.name if file.name == LORA_WEIGHT_NAME_SAFE else file.stem
    experts = {
        component: Expert(name or stem, layers[component], bases[component], where)
        for component in COMPONENTS
        if layers.get(component)
    }
    if not experts:
        raise ValueError(f"{where} changes no layer: all its factors are zero")
    return LoraFile(experts, _triggers(header), form)


def write_lora(
    experts: Mapping[str, Expert],
    path: str | Path,
    form: Form = "diffusers",
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one expert's parts as a LoRA, complete or not at all; an older one is replaced.

    Args:
        experts: By component: unet, text_encoder, text_encoder_2.
        path: peft: a folder, which gets one for each component. diffusers: a .safetensors file,
            or a folder, which gets pytorch_lora_weights.safetensors. kohya: a .safetensors file.
        form: The format. All three are read back to the same updates. In kohya's, an alpha that
            diffusers would lose is counted into the up projection.
        metadata: More entries of the file's header.
        dtype: Type of the stored factors; their own if not given.

    Raises:
        ValueError: Components or a path that the format has no place for, numbers that `dtype`
            cannot hold.
    """
    path = Path(path)
    _check_write(experts, path, form, metadata or {})
    if dtype is not None:
        experts = {component: _cast(expert, dtype) for component, expert in experts.items()}
    if form == "peft":
        with new_folder(path) as folder:
            for component, expert in experts.items():
                write_peft(expert, folder / component, metadata=metadata)
        return
    header = {**(metadata or {}), "format": "pt"}
    if form == "diffusers":
        tensors, config = diffusers_tensors(experts)
        header |= config
        path = path if path.suffix == ".safetensors" else path / LORA_WEIGHT_NAME_SAFE
    else:
        tensors = kohya_tensors(experts)
        bases = [expert.base for expert in experts.values() if expert.base]
        header = {"ss_sd_model_name": bases[0], **header} if bases else header
    with new_file(path) as partial:
        save_file(tensors, partial, metadata=header)


def _read_folder(folder: Path, name: str | None) -> LoraFile:
    if (folder / LORA_WEIGHT_NAME).exists():
        raise _pickled(folder / LORA_WEIGHT_NAME)
    if not (folder / CONFIG).exists() and not any(folder.glob(f"*/{CONFIG}")):
        raise FileNotFoundError(
            f"{folder} holds no LoRA: expected {CONFIG}, folders with it by component "
            f"({', '.join(COMPONENTS)}), or {LORA_WEIGHT_NAME_SAFE}"
        )
    experts = {part or "unet": expert for part, expert in read_components(folder, name).items()}
    strange = sorted(experts.keys() - set(COMPONENTS))
    if strange:
        raise ValueError(
            f"{folder} holds LoRAs of {', '.join(strange)}, expected {', '.join(COMPONENTS)} alone"
        )
    return LoraFile(experts, (), "peft")


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{file} is empty: it holds no tensors")
    return tensors, header


def _pickled(file: Path) -> ValueError:
    return ValueError(
        f"{file} is a pickle, which can run code when it is read; convert it to .safetensors where "
        "you trust it"
    )


def _triggers(header: Mapping[str, str]) -> tuple[str, ...]:
    words = [word.strip() for word in header.get("modelspec.trigger_phrase", "").split(",")]
    if any(words):
        return tuple(dict.fromkeys(filter(None, words)))
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(header.get("ss_tag_frequency", "{}")).values():
            for tag, count in tags.items():
                counts[tag.strip()] += int(count)
    except (ValueError, TypeError, AttributeError):
        # Words for people: a LoRA without them is read all the same.
        return ()
    return tuple(tag for tag, _ in counts.most_common(_TAGS))


def _is_dora(expert: Expert) -> bool:
    return any(factors.magnitude is not None for factors in expert.layers.values())


def _check_write(
    experts: Mapping[str, Expert], path: Path, form: str, metadata: Mapping[str, str]
) -> None:
    single = path.suffix == ".safetensors"
    faults = [
        one_of("form", form, get_args(Form)),
        None if experts else "no experts, expected at least one",
        *(one_of("component", component, COMPONENTS) for component in experts),
        f"{path} is not .safetensors, kohya's one file" if form == "kohya" and not single else None,
        f"{path} is a file, expected a folder" if form == "peft" and single else None,
        *(
            f"{component} is a DoRA, which is written in peft's format alone"
            for component, expert in experts.items()
            if form != "peft" and component in COMPONENTS and _is_dora(expert)
        ),
        *(
            f"metadata holds {key!r}, which the file's own header has"
            for key in ("format", LORA_ADAPTER_METADATA_KEY)
            if key in metadata
        ),
        *(
            f"metadata {key!r} is {value!r}, expected text"
            for key, value in metadata.items()
            if not isinstance(value, str)
        ),
    ]
    if form == "peft" and path.is_dir():
        # The folder is replaced as a whole: it must hold nothing but an older LoRA.
        others = sorted(child.name for child in path.iterdir() if child.name not in COMPONENTS)
        faults.append(f"{path} holds {others[0]}, which is no part of a LoRA" if others else None)
    refuse("write_lora", faults)


def _cast(expert: Expert, dtype: torch.dtype) -> Expert:
    layers: dict[str, Factors] = {
        path: replace(factors, a=factors.a.to(dtype), b=factors.b.to(dtype))
        for path, factors in expert.layers.items()
    }
    return Expert(expert.name, layers, expert.base, f"{expert.source} as {dtype}")
