"""Experts' updates side by side, layer by layer: what similarities, norms and merges read."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mole_vl.experts import Expert, Factors, check_names
from mole_vl.faults import refuse, some, told


def updates_by_layer(subject: str, experts: Sequence[Expert]) -> dict[str, list[Factors | None]]:
    """Every expert's factors at every layer that one of them changes, of one shape at each layer.

    Args:
        subject: Who asks, for messages.
        experts: At least one; ranks, alphas and layers may differ.

    Returns:
        By layer, one for each expert in order; None where it leaves the layer alone.

    Raises:
        ValueError: Experts that share a name, a DoRA, or a layer that two know in different shapes.
    """
    check_names(experts)
    paths = list(dict.fromkeys(path for expert in experts for path in expert.layers))
    refuse(subject, told(faults_of_dora(experts)))
    updates, faults = {}, []
    for path in paths:
        own = [expert for expert in experts if path in expert.layers]
        try:
            found = iter(fitted(path, own))
            updates[path] = [next(found) if path in one.layers else None for one in experts]
        except ValueError as fault:
            faults.append(str(fault))
    refuse(subject, told(faults))
    return updates


def fitted(path: str, experts: Sequence[Expert]) -> list[Factors]:
    """The factors of experts that all change a layer, of the first one's shape.

    Raises:
        ValueError: One of them knows the layer in another shape.
    """
    first = experts[0]
    found = []
    for one in experts:
        try:
            found.append(one.layers[path].fitted(first.layers[path].shape))
        except ValueError as fault:
            raise ValueError(
                f"at {path}, expert {one.name!r} has {fault}, as {first.name!r} has it"
            ) from fault
    return found


def on_common_layers(experts: Sequence[Expert]) -> list[Expert]:
    """Each expert on those layers alone that every one of them changes.

    Experts that were trained on other layers are far apart by that alone.

    Raises:
        ValueError: Experts that share a name, or no layer that all of them change.
    """
    check_names(experts)
    common = [path for path in experts[0].layers if all(path in one.layers for one in experts)]
    if not common:
        raise ValueError(
            f"no layer is changed by all of {some(one.name for one in experts)}: compare them over "
            "all layers"
        )
    return [replace(one, layers={path: one.layers[path] for path in common}) for one in experts]


def faults_of_dora(experts: Sequence[Expert]) -> list[str]:
    """The fault of each expert that is a DoRA: its Delta-W hangs on the base's weight."""
    found = {
        expert.name: [path for path, own in expert.layers.items() if own.magnitude is not None]
        for expert in experts
    }
    return [
        f"expert {name!r} is a DoRA at {some(paths)}: its Delta-W is not known without the base; "
        "leave it out, or bake it into a base"
        for name, paths in found.items()
        if paths
    ]


def stacked_factors(present: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Factors of several updates of one layer along one rank axis, in fp64.

    Returns:
        a (R, in), a convolution's kernel flattened, and b (out, R) with the scales in.
    """
    a = torch.cat([own.a.double().flatten(1) for own in present])
    b = torch.cat([own.b.double() * own.scale for own in present], dim=1)
    return a, b
