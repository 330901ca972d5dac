"""The layers that a LoRA in training is to change, by the ends of their names."""

from collections.abc import Iterable

from torch import nn

from mole_vl.faults import refuse


def check_targets(model: nn.Module, name: str, targets: Iterable[str]) -> None:
    """Raise ValueError unless each target names layers of the model, and linear ones alone.

    peft is content when one of the targets is found, and takes convolutions too.

    Args:
        model: The base.
        name: The LoRA's, for the message.
        targets: Ends of module paths, such as `q_proj` or `to_out.0`.
    """
    faults = []
    for target in targets:
        kinds = {
            type(module).__name__: isinstance(module, nn.Linear)
            for path, module in model.named_modules()
            if f".{path}".endswith(f".{target}")
        }
        if not kinds:
            faults.append(f"{target!r} names no layer of {type(model).__name__}")
        faults += [
            f"{target!r} names a {kind}, expected linear layers"
            for kind, linear in kinds.items()
            if not linear
        ]
    refuse(f"the targets of {name}", faults)
