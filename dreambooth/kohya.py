"""kohya's / A1111's LoRA format: flattened names of layers, and an alpha for each.

Names are turned into paths by diffusers' own converter, a layer at a time: given a whole file it
drops layers in sgm names if others have diffusers' names, and its alphas go astray (see
`_folded`).
"""

import re
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_peft
from torch import Tensor

from dreambooth.lora_pairs import Parts, is_path
from mole_vl.experts import Expert, Factors

_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_PARTS = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
}
_SGM = re.compile(r"lora_unet_(input_blocks_(?!0_0)|middle_block_|output_blocks_)")
_ATTENTION = re.compile(r"\.to_(q|k|v|out\.0)$")


def is_kohya(key: str) -> bool:
    """Whether a key is one of this format."""
    return key.startswith(tuple(_PREFIXES))


def kohya_parts(
    tensors: Mapping[str, Tensor], where: str, unet_config: Mapping[str, Any] | None = None
) -> Parts:
    """Sort a file's tensors by component, path and part.

    Args:
        tensors: The file's.
        where: The file, for messages.
        unet_config: The UNet's config; needed for SDXL in sgm names (`input_blocks_4_1_...`).

    Raises:
        ValueError: A key that is not known, or sgm names without `unet_config`.
    """
    found: Parts = {}
    places: dict[str, tuple[str, str]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        if not is_kohya(key) or part not in _PARTS:
            raise ValueError(
                f"{where}: the key {key!r} is not used; expected keys such as "
                "lora_unet_NAME.lora_down.weight, lora_up.weight and alpha"
            )
        if name not in places:
            places[name] = _place(name, where, unet_config)
        component, path = places[name]
        parts = found.setdefault(component, {}).setdefault(path, {})
        if _PARTS[part] in parts:
            raise ValueError(f"{where}: {key!r} names {component}'s {path} a second time")
        parts[_PARTS[part]] = tensor
    for component in found.keys() - {"unet"}:
        found[component] = {p: v for p, v in found[component].items() if not _padding(p, v)}
    return found


def kohya_tensors(experts: Mapping[str, Expert]) -> dict[str, Tensor]:
    """A file's tensors for experts by component, such that diffusers, too, reads them right.

    Raises:
        ValueError: A path that this format cannot name.
    """
    tensors: dict[str, Tensor] = {}
    te = "lora_te1_" if "text_encoder_2" in experts else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": te, "text_encoder_2": "lora_te2_"}
    for component, expert in experts.items():
        layers = {_full(component, path): factors for path, factors in expert.layers.items()}
        if component != "unet":
            layers |= _missing_outputs(layers)
        # Folding may leave the range of 16 bits: an expert refuses what is not finite.
        folded = _folded(component, layers)
        for path, factors in Expert(expert.name, folded, source=expert.source).layers.items():
            name = prefixes[component] + path.replace(".", "_")
            if _place(name, expert.source) != (component, path):
                raise ValueError(
                    f"expert {expert.name!r} from {expert.source}: kohya's format has no name for "
                    f"{component}'s layer {path}; write another form"
                )
            up = factors.b if factors.a.dim() == 2 else factors.b[:, :, None, None]
            tensors[f"{name}.lora_down.weight"] = factors.a
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = _number(factors.scale * factors.rank)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _place(name: str, where: str, unet_config: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Component and path of a layer by its flattened name."""
    if _SGM.match(name) and unet_config is None:
        raise ValueError(
            f"{where}: {name} is a name of the sgm UNet, whose blocks are counted otherwise: "
            "give `unet_config`, the config of the UNet that the LoRA is for"
        )
    component = next(c for prefix, c in _PREFIXES.items() if name.startswith(prefix))
    config = unet_config and SimpleNamespace(layers_per_block=unet_config["layers_per_block"])
    # The one name of diffusers' own that its converter shortens: its sgm name it reads.
    asked = re.sub(r"_add_embedding_linear_([12])$", _label, name)
    nothing = torch.empty(0)
    pair = {f"{asked}.lora_down.weight": nothing, f"{asked}.lora_up.weight": nothing}
    try:
        state: Any = StableDiffusionXLLoraLoaderMixin.lora_state_dict(pair, unet_config=config)[0]
    except (ValueError, LookupError):
        state = {}
    state = {key.removeprefix(f"{component}."): tensor for key, tensor in state.items()}
    if component == "unet":
        state = convert_unet_state_dict_to_peft(state)
    else:
        # The first knows attention and feed-forward, the second the projection.
        for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
            state = convert_state_dict_to_peft(state, kind)
    path = next(iter(state), "").removesuffix(".lora_A.weight")
    if not is_path(component, path):
        raise ValueError(f"{where}: {name} names no layer of a Stable Diffusion's {component}")
    return component, path


def _label(found: re.Match[str]) -> str:
    return f"_label_emb_0_{2 * int(found[1]) - 2}"


def _full(component: str, path: str) -> str:
    # transformers 5 has dropped the `text_model.` of its text encoder; the format keeps it.
    bare = component != "unet" and path.startswith("encoder.")
    return f"text_model.{path}" if bare else path


def _missing_outputs(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    # diffusers takes a text encoder's attention for kohya's by its out_proj, and refuses a file
    # (or, with a feed-forward's layers in it, drops the attention) that has none: it gets a zero.
    if any(path.endswith("out_proj") for path in layers):
        return {}
    for path, factors in layers.items():
        attention, _, layer = path.rpartition(".")
        if layer in ("q_proj", "k_proj", "v_proj"):
            out, into = factors.shape[:2]
            zero = Factors(factors.a.new_zeros(1, into), factors.b.new_zeros(out, 1), factors.scale)
            return {f"{attention}.out_proj": zero}
    return {}


def _padding(path: str, parts: Mapping[str, Tensor]) -> bool:
    factors = [tensor for part, tensor in parts.items() if part != "alpha"]
    return path.endswith("out_proj") and not any(factor.any() for factor in factors)


def _folded(component: str, layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates, those with one alpha whose own alpha diffusers would lose.

    It gives attention layers and text encoders the most frequent alpha of the component, whatever
    theirs is: the difference goes into the up projection.
    """
    alphas = Counter(factors.scale * factors.rank for factors in layers.values())
    common = alphas.most_common(1)[0][0]
    folded = {}
    for path, factors in layers.items():
        lost = component != "unet" or _ATTENTION.search(path)
        if lost and factors.scale * factors.rank != common:
            scale = common / factors.rank
            b = factors.b.float() * (factors.scale / scale)
            factors = Factors(factors.a, b.to(factors.b.dtype), scale)
        folded[path] = factors
    return folded


def _number(alpha: float) -> Tensor:
    # In fp32, as its readers expect it, where that holds the number.
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
