"""Sums of experts as experts, exact on Delta-W: ranks add up, nothing is decomposed."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mole_vl.experts import Expert, Factors
from mole_vl.faults import refuse
from mole_vl.updates import faults_of_dora, fitted


def weighted_sum(name: str, experts: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """One expert whose Delta-W is `sum_e w_e Delta-W_e`, layer by layer.

    Args:
        name: The new expert's.
        experts: At least one; ranks, alphas and layers may differ.
        weights: One for each.

    Raises:
        ValueError: Not one finite weight for each expert, all of them zero, a DoRA, or a layer that
            two experts know in different shapes.
    """
    refuse(
        "weighted_sum",
        [
            *faults_of_weights(experts, weights),
            *faults_of_dora(experts),
        ],
    )
    parts: dict[str, list[tuple[Expert, float]]] = {}
    for expert, weight in zip(experts, weights, strict=True):
        for path in expert.layers if weight else ():
            parts.setdefault(path, []).append((expert, weight))
    if not parts:
        raise ValueError("weighted_sum: with these weights nothing changes the base")
    return Expert(name, {path: _joined(path, own) for path, own in parts.items()})


def faults_of_weights(experts: Sequence[Expert], weights: Sequence[float]) -> list[str]:
    """What is wrong with weights that are to be one finite number for each expert."""
    if len(experts) != len(weights):
        return [f"{len(weights)} weights for {len(experts)} experts"]
    return [
        f"the weight of {expert.name!r} is {weight}, expected a finite number"
        for expert, weight in zip(experts, weights, strict=True)
        if not abs(weight) < float("inf")
    ]


def _joined(path: str, parts: Sequence[tuple[Expert, float]]) -> Factors:
    experts, weights = zip(*parts, strict=True)
    try:
        own = fitted(path, experts)
    except ValueError as error:
        raise ValueError(f"weighted_sum: {error}") from error
    if len(own) == 1:
        return replace(own[0], scale=own[0].scale * weights[0])
    a = torch.cat([factors.a.float() for factors in own])
    scaled = zip(own, weights, strict=True)
    return Factors(a, torch.cat([f.b.float() * (f.scale * w) for f, w in scaled], dim=1), 1.0)


def without_general(experts: Sequence[Expert], general: Sequence[Expert]) -> list[Expert]:
    """Each expert less the mean of general ones: what is its own remains (GenKnowSub).

    As peft's Arrow offers, but of Delta-W: peft subtracts the means of A and of B apart, whose
    product is another update.

    Args:
        experts: Task experts; they keep their names.
        general: Experts of what every task needs, such as LoRAs of plain text in some languages.
    """
    if not general:
        return list(experts)
    share = -1 / len(general)
    return [
        weighted_sum(one.name, [one, *general], [1.0] + [share] * len(general)) for one in experts
    ]
