"""The layers that a LoRA in training is to change, by the ends of their names."""

from collections.abc import Iterable

from torch import nn

from mole_vl.faults import refuse
from mole_vl.layers import is_transposed


def check_targets(
    model: nn.Module, name: str, targets: Iterable[str], *, convolutions: bool = False
) -> None:
    """Raise ValueError unless each target names layers of the model, of the right kind alone.

    peft is content when one of the targets is found, and takes more kinds.

    Args:
        model: The base.
        name: The LoRA's, for the message.
        targets: Ends of module paths, such as `q_proj` or `to_out.0`.
        convolutions: Whether they are taken beside linear layers; those in groups never are.
    """
    faults = []
    takes = (nn.Linear, nn.Conv2d) if convolutions else nn.Linear

    def fits(layer: nn.Module) -> bool:
        return (isinstance(layer, takes) and not _grouped(layer)) or is_transposed(layer)

    wanted = "linear layers or convolutions" if convolutions else "linear layers"
    for target in targets:
        layers = target_layers(model, [target]).values()
        if not layers:
            faults.append(f"{target!r} names no layer of {type(model).__name__}")
        odd = {_kind(layer) for layer in layers if not fits(layer)}
        faults += [f"{target!r} names a {kind}, expected {wanted}" for kind in sorted(odd)]
    refuse(f"the targets of {name}", faults)


def target_layers(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """The layers that targets name, by path, as peft matches them."""
    ends = tuple(f".{target}" for target in targets)
    return {path: module for path, module in model.named_modules() if f".{path}".endswith(ends)}


def _grouped(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) != 1


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__ + (" in groups" if _grouped(layer) else "")
