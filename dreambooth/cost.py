"""What training a LoRA will cost, before it is begun."""

from collections.abc import Sequence
from math import prod

from torch import nn

from dreambooth.adapting import adapted_parts
from dreambooth.base import Base
from dreambooth.candidates import CandidateConfig, CandidatesConfig
from dreambooth.class_pictures import missing_pictures
from dreambooth.data import Example
from mole_vl.targets import target_layers

# bitsandbytes keeps the averages of smaller tensors in 32 bits.
_SMALL = 4096


def cost(
    base: Base, candidate: CandidateConfig, examples: Sequence[Example], config: CandidatesConfig
) -> str:
    """Parameters, memory, steps and pictures of one LoRA, in a few lines.

    The memory is that of the weights, the gradients and the optimiser; activations come on top,
    and depend on resolution, rows and checkpointing.
    """
    sizes = {
        component: factor_sizes(network, kind.targets, kind.rank)
        for component, (network, kind) in adapted_parts(base, candidate).items()
    }
    shares = ", ".join(
        f"{sum(found):,} in {len(found) // 2} layers of the {component}"
        for component, found in sizes.items()
    )
    every = [size for found in sizes.values() for size in found]
    steps, rows = candidate.steps or config.fit.steps, config.fit.rows
    shown = steps * rows
    lines = [
        f"{candidate.name}: trains {sum(every):,} parameters ({shares})",
        f"  memory without activations: {_gib(_weights(base))} of the base, "
        f"{_gib(sum(_bytes(size, config) for size in every))} of the LoRA in training",
        f"  {steps:,} steps of {rows} rows: {len(examples):,} pictures, each shown "
        f"{shown / len(examples):,.0f} times",
    ]
    if candidate.prior is not None:
        lacking = len(missing_pictures(candidate.prior))
        lines.append(
            f"  {shown:,} rows of class pictures beside them, {lacking:,} pictures of "
            f"{candidate.prior.prompt!r} to be drawn first"
        )
    if candidate.samples:
        looks = -(-steps // config.sample_every)
        lines.append(f"  {looks * len(candidate.samples):,} samples on the way")
    return "\n".join(lines)


def factor_sizes(network: nn.Module, targets: Sequence[str], rank: int) -> list[int]:
    """Numbers in each factor, A and B of every layer in turn."""
    sizes = []
    for layer in target_layers(network, targets).values():
        out, *into = layer.get_parameter("weight").shape
        sizes += [rank * prod(into), rank * out]
    return sizes


def _bytes(size: int, config: CandidatesConfig) -> int:
    averages = 2 if config.fit.optimizer == "adamw8bit" and size >= _SMALL else 8
    # Weight and gradient in fp32, the optimiser's two averages (Muon's one is less), and the EMA.
    return size * (8 + averages + (4 if config.fit.ema else 0))


def _weights(base: Base) -> int:
    networks = (base.unet, *base.text_encoders.values(), base.vae)
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
