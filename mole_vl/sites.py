"""Sites: which layers share one gate result.

- matrix: each layer that carries a LoRA has its own gate, which reads the layer's input.
- layer: each child of a block that holds such layers (attention, feed-forward); it reads the
  child's input.
- block: each block, the nearest ancestor that the model itself names as repeated; it reads the
  block's input.
- network: the whole model; it reads the input of the first block that carries experts, or of a
  later one: then the blocks before it share a gate that reads nothing (X-LoRA in one pass).
- preview: the whole model; the base runs first, alone or under the experts' average, up to the
  block whose input the gate reads, then the whole model with the weights found (X-LoRA's two
  passes, the first cut short).
- feedforward: each feed-forward of a block; it reads the feed-forward's input, and each position
  runs the whole of it once for each of its experts (MixLoRA). What lies outside of all of them
  shares a gate that reads nothing.

A matrix outside every block is its own site, but where one gate serves the whole model.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from mole_vl.faults import at_least, one_of, refuse
from mole_vl.feedforward import FeedForward, feed_forwards

SiteKind = Literal["matrix", "layer", "block", "network", "preview", "feedforward"]
NETWORK = "network"
BELOW = "below"
REST = "rest"


@dataclass(frozen=True)
class Site:
    """Layers that share a gate.

    Args:
        name: The path of the module that the gate belongs to, `network`, `below`, or `rest`.
        entry: The path of the module whose input the gate reads; None if it runs too early to
            read anything.
        width: Width of that input.
        matrices: Paths of the layers that share the result.
        features: Width of what the model itself is told and the gate reads too; 0 for nothing.
        experts: Names of the experts that change any of its layers.
        feedforward: The module that runs once for each expert; None for a layer mixture.
    """

    name: str
    entry: str | None
    width: int
    matrices: tuple[str, ...]
    features: int = 0
    experts: tuple[str, ...] = ()
    feedforward: FeedForward | None = None


@dataclass(frozen=True)
class Layout:
    """All sites of a mixed model, and what they were found by.

    Args:
        kind: How much shares one gate.
        after: How many of the blocks that carry experts run before the whole model's gate reads.
        sites: The sites, in the model's order.
        blocks: Paths of the model's blocks.
    """

    kind: SiteKind
    after: int
    sites: tuple[Site, ...]
    blocks: tuple[str, ...] = ()

    def conditioned(self, features: int) -> "Layout":
        """The same sites, their gates conditioned on features of this width."""
        sites = tuple(replace(site, features=features) for site in self.sites)
        return replace(self, sites=sites)

    def staffed(self, experts: Mapping[str, Collection[str]]) -> "Layout":
        """The same sites, with their experts.

        Args:
            experts: The layers that each expert changes, by its name.
        """

        def own(site: Site) -> tuple[str, ...]:
            return tuple(
                n for n, paths in experts.items() if not set(site.matrices).isdisjoint(paths)
            )

        return replace(self, sites=tuple(replace(site, experts=own(site)) for site in self.sites))


def find_sites(
    kind: SiteKind,
    model: nn.Module,
    matrices: Mapping[str, int],
    blocks: Mapping[str, int],
    after: int = 0,
) -> Layout:
    """Group the layers that carry experts into sites, in the model's order.

    Args:
        kind: How much shares one gate.
        model: The model, for the children of its blocks.
        matrices: in_features of each layer that carries experts, by path.
        blocks: Width of each of the model's blocks, by path, in the order they run; the domain's
            adapter knows them.
        after: How many of the blocks that carry experts run before the whole model's gate reads.

    Raises:
        ValueError: An unknown kind, a block that the model lacks, sites that need blocks where
            none are given, or `after` that leaves the gate no block.
    """
    refuse(
        "site",
        [
            one_of("kind", kind, get_args(SiteKind)),
            at_least("after", after, 0),
            f"after is {after}, which is for the kinds 'network' and 'preview', not {kind!r}: set "
            "after to 0"
            if after > 0 and kind not in ("network", "preview")
            else None,
        ],
    )
    known = dict(model.named_modules())
    strange = [path for path in blocks if path not in known]
    if strange:
        raise ValueError(f"blocks: the model has no module {', '.join(strange[:3])}")
    if kind in ("network", "preview"):
        return Layout(kind, after, _whole(kind, matrices, blocks, after), tuple(blocks))
    if kind == "feedforward":
        return Layout(kind, after, _feed_forwards(model, matrices, blocks), tuple(blocks))
    if kind in {"layer", "block"} and not any(block_of(path, blocks) for path in matrices):
        raise ValueError(
            f"site {kind!r}: none of the layers that carry experts lies in a block; hand the "
            "model's blocks to `blocks`, or use site 'matrix'"
        )
    groups: dict[str, list[str]] = {}
    for path in matrices:
        groups.setdefault(_owner(kind, path, known, blocks), []).append(path)
    sites = []
    for owner, members in groups.items():
        block = block_of(owner, blocks)
        width = matrices[owner] if owner in matrices or block is None else blocks[block]
        sites.append(Site(owner, owner, width, tuple(members)))
    return Layout(kind, after, tuple(sites), tuple(blocks))


def _feed_forwards(
    model: nn.Module, matrices: Mapping[str, int], blocks: Mapping[str, int]
) -> tuple[Site, ...]:
    found = feed_forwards(model, matrices, blocks)
    if not found:
        raise ValueError(
            "site 'feedforward': none of the layers that carry experts lies in a feed-forward, a "
            "module inside a block that maps each position alone and whose last linear layer "
            "writes its output; hand the model's blocks to `blocks`, or use site 'matrix'"
        )
    sites = [
        Site(
            own.path,
            own.path,
            own.width,
            tuple(path for path in matrices if found.get(path) is own),
            feedforward=own,
        )
        for own in dict.fromkeys(found.values())
    ]
    rest = tuple(path for path in matrices if path not in found)
    return (*sites, Site(REST, None, sites[0].width, rest)) if rest else tuple(sites)


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


def _whole(
    kind: SiteKind, matrices: Mapping[str, int], blocks: Mapping[str, int], after: int
) -> tuple[Site, ...]:
    held = {block_of(path, blocks) for path in matrices}
    carrying = [block for block in blocks if block in held]
    if not carrying:
        raise ValueError(
            f"site {kind!r} reads the input of a block that carries experts, and none does: hand "
            "the model's blocks to `blocks`, or use site 'matrix'"
        )
    if after >= len(carrying):
        raise ValueError(
            f"after is {after}, but only {len(carrying)} blocks carry experts: the gate would "
            f"have none to read; expected at most {len(carrying) - 1}"
        )
    early, entry = set(carrying[:after]), carrying[after]
    if kind == "preview":
        return (Site(NETWORK, entry, blocks[entry], tuple(matrices)),)
    below = tuple(path for path in matrices if block_of(path, blocks) in early)
    rest = tuple(path for path in matrices if path not in set(below))
    network = Site(NETWORK, entry, blocks[entry], rest)
    return (Site(BELOW, None, blocks[carrying[0]], below), network) if below else (network,)


def block_of(path: str, blocks: Iterable[str]) -> str | None:
    """The nearest block that is the module itself or an ancestor of it."""
    found = [block for block in blocks if path == block or path.startswith(f"{block}.")]
    return max(found, key=len, default=None)


def _owner(kind: str, path: str, known: Mapping[str, nn.Module], blocks: Iterable[str]) -> str:
    block = block_of(path, blocks)
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
