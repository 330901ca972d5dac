"""Sites: which layers share one gate result.

- matrix: each layer that carries a LoRA has its own gate, which reads the layer's input.
- layer: each child of a block that holds such layers (attention, feed-forward); it reads the
  child's input.
- block: each block, the nearest ancestor that the model itself names as repeated; it reads the
  block's input.
- network: the whole model; it reads the input of the first block that carries experts.

A matrix outside every block is its own site, whatever the kind but network.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from mole_vl.faults import one_of, refuse

SiteKind = Literal["matrix", "layer", "block", "network"]
NETWORK = "network"


@dataclass(frozen=True)
class Site:
    """Layers that share a gate.

    Args:
        name: The path of the module that the gate belongs to, or `network`.
        entry: The path of the module whose input the gate reads.
        width: Width of that input.
        matrices: Paths of the layers that share the result.
    """

    name: str
    entry: str
    width: int
    matrices: tuple[str, ...]


def find_sites(
    kind: SiteKind, model: nn.Module, matrices: Mapping[str, int], blocks: Mapping[str, int]
) -> tuple[Site, ...]:
    """Group the layers that carry experts into sites, in the model's order.

    Args:
        kind: How much shares one gate.
        model: The model, for the children of its blocks.
        matrices: in_features of each layer that carries experts, by path.
        blocks: Width of each of the model's blocks, by path, in the order they run; the domain's
            adapter knows them.

    Raises:
        ValueError: An unknown kind, a block that the model lacks, or sites that need blocks
            where none are given.
    """
    refuse("site", [one_of("kind", kind, get_args(SiteKind))])
    known = dict(model.named_modules())
    strange = [path for path in blocks if path not in known]
    if strange:
        raise ValueError(f"blocks: the model has no module {', '.join(strange[:3])}")
    if kind == "network":
        return (_network(matrices, blocks),)
    if kind in {"layer", "block"} and not any(_block_of(path, blocks) for path in matrices):
        raise ValueError(
            f"site {kind!r}: none of the layers that carry experts lies in a block; hand the "
            "model's blocks to `blocks`, or use site 'matrix'"
        )
    groups: dict[str, list[str]] = {}
    for path in matrices:
        groups.setdefault(_owner(kind, path, known, blocks), []).append(path)
    sites = []
    for owner, members in groups.items():
        block = _block_of(owner, blocks)
        width = matrices[owner] if owner in matrices or block is None else blocks[block]
        sites.append(Site(owner, owner, width, tuple(members)))
    return tuple(sites)


def blocks_of(
    model: nn.Module, kinds: Iterable[str], width: Callable[[nn.Module], int]
) -> dict[str, int]:
    """Width of each module whose class has one of the names in `kinds`, by path."""
    names = set(kinds)
    return {
        path: width(module)
        for path, module in model.named_modules()
        if type(module).__name__ in names
    }


def _network(matrices: Mapping[str, int], blocks: Mapping[str, int]) -> Site:
    held = {_block_of(path, blocks) for path in matrices}
    first = next((block for block in blocks if block in held), None)
    if first is None:
        raise ValueError(
            "site 'network' reads the input of the first block that carries experts, and none "
            "does: hand the model's blocks to `blocks`, or use site 'matrix'"
        )
    return Site(NETWORK, first, blocks[first], tuple(matrices))


def _block_of(path: str, blocks: Iterable[str]) -> str | None:
    """The nearest block that is the module itself or an ancestor of it."""
    found = [block for block in blocks if path == block or path.startswith(f"{block}.")]
    return max(found, key=len, default=None)


def _owner(kind: str, path: str, known: Mapping[str, nn.Module], blocks: Iterable[str]) -> str:
    block = _block_of(path, blocks)
    if kind == "matrix" or block is None:
        return path
    if kind == "block":
        return block
    steps = path[len(block) + 1 :].split(".")
    for depth in range(1, len(steps) + 1):
        child = ".".join([block, *steps[:depth]])
        # A list of modules is never called itself: what it holds is.
        if not isinstance(known[child], nn.ModuleList | nn.ModuleDict):
            return child
    raise AssertionError(path)
