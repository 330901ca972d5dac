"""What LoRA files of all formats come down to: pairs of factors by component and path."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mole_vl.experts import Factors

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# By component, then by module path, then by part: A, B, mid, alpha.
Parts = dict[str, dict[str, dict[str, Tensor]]]

_OTHER_METHODS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
    "oft_": "OFT", "boft_": "BOFT", "ia3_": "IA3", "on_input": "IA3", "diff": "a full difference",
    "diff_b": "a difference of biases", "a1": "GLoRA", "b1": "GLoRA",
}  # fmt: skip
_PATHS = {
    "unet": re.compile(
        r"(down_blocks|mid_block|up_blocks)\..+"
        r"|conv_in|conv_out|(time|add)_embedding\.linear_\d|class_embedding\.linear_\d"
    ),
    "text": re.compile(
        r"(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\.\w+|text_projection"
    ),
}


def refuse_other_methods(keys: Iterable[str], where: str) -> None:
    """Raise ValueError at the first key of a method whose update is no product of two factors."""
    for key in keys:
        for word in key.split("."):
            for mark, method in _OTHER_METHODS.items():
                if word == mark or (mark.endswith("_") and word.startswith(mark)):
                    raise ValueError(
                        f"{where}: the key {key!r} is of {method}, expected plain LoRA alone; "
                        "extract a plain LoRA from it with its trainer's tools"
                    )


def is_path(component: str, path: str) -> bool:
    """Whether a path can be one of a Stable Diffusion's UNet or text encoder."""
    return bool(_PATHS["unet" if component == "unet" else "text"].fullmatch(path))


def pair_factors(parts: Mapping[str, Tensor], where: str) -> Factors:
    """The factors of one layer, scaled by alpha / rank; without an alpha by 1.

    A `mid` is LoCon's core between two convolutions of single pixels (a CP decomposition): the
    update is up . mid . down, and its down projection here is mid . down, exactly.

    Raises:
        ValueError: Half a pair, shapes that make no product, an alpha that is no number.
    """
    if not {"A", "B"} <= parts.keys():
        raise ValueError(f"{where} has {', '.join(sorted(parts))} alone, expected both factors")
    for name, part in parts.items():
        if not part.is_floating_point() and name != "alpha":
            raise ValueError(f"{where} has a factor {name} of {part.dtype}, expected floats")
    a, b = parts["A"], parts["B"]
    rank = a.shape[0] if a.dim() else 0
    if "mid" in parts:
        # The product in fp32; its up projection goes along, as both factors share a type.
        a, b = _composed(parts["mid"], a, where), b.float()
    single = b.dim() == 2 or (b.dim() == 4 and b.shape[2:] == (1, 1))
    if rank == 0 or a.dim() not in (2, 4) or not single or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{where} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, expected "
            "(rank, in) and (out, rank), or a convolution's (rank, in, h, w) and (out, rank, 1, 1)"
        )
    return Factors(a, b.flatten(1), _alpha(parts.get("alpha"), rank, where) / rank)


def _composed(mid: Tensor, a: Tensor, where: str) -> Tensor:
    if mid.dim() != 4 or a.dim() != 4 or a.shape[2:] != (1, 1) or mid.shape[1] != a.shape[0]:
        raise ValueError(
            f"{where} has lora_mid of shape {tuple(mid.shape)} over lora_down of "
            f"{tuple(a.shape)}, expected (rank, rank, h, w) over (rank, in, 1, 1)"
        )
    return torch.einsum("pqhw,qi->pihw", mid.float(), a.float().flatten(1))


def _alpha(alpha: Tensor | None, rank: int, where: str) -> float:
    if alpha is None:
        return float(rank)
    if alpha.numel() != 1 or not torch.isfinite(alpha).all():
        raise ValueError(f"{where} has the alpha {alpha.tolist()}, expected one finite number")
    return float(alpha)
