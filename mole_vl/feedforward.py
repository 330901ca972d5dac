"""The feed-forward mixture: `y = sum_e g_e FF(x; W + Delta-W_e)`, nonlinearity inside.

MixLoRA (arXiv 2404.15159). Each position runs the whole feed-forward once for each of its experts:
the module's own forward reads the positions grouped by expert, so that it stays what it is, gated
or plain, with whatever nonlinearity. Its first layers compute the base's part once a position; its
last one sums before the base's product, which is linear, and adds the base's bias once.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mole_vl.dora import unbiased
from mole_vl.fanned import Fanned
from mole_vl.layers import MixtureConv2d, MixtureLayer, MixtureLinear, layer_shapes


@dataclass(frozen=True)
class FeedForward:
    """A module that maps each position alone, through linear layers.

    Args:
        path: Its path.
        width: Width of what it reads and writes.
        inlets: Paths of the linear layers that read its input.
        outlet: Path of the linear layer whose output is its own.
    """

    path: str
    width: int
    inlets: tuple[str, ...]
    outlet: str


class MixtureInlet(MixtureLinear):
    """A linear layer that reads a feed-forward's input."""

    def fanned(self, x: Tensor, told: Fanned) -> Tensor:
        """The base's output, computed once a position, plus each expert's update: (1, m, o)."""
        y = told.of_positions(self.base(told.x)).unsqueeze(0)
        shift = self.shift()
        update = self.updates(x, told, shift).to(y.dtype)
        if shift is not None:
            update = update + self.unbiased(y) * told.of_experts(shift).to(y.dtype)
        return y + update


class MixtureOutlet(MixtureLinear):
    """The linear layer that writes a feed-forward's output."""

    def fanned(self, x: Tensor, told: Fanned) -> Tensor:
        """The base's output of the weighed sum that it reads, plus the updates: (1, n, o)."""
        shift = self.shift()
        y = self.base(told.summed(x))
        update = self.updates(x, told, shift).to(y.dtype)
        if shift is not None:
            # What the base says is rescaled for each expert by itself.
            said = unbiased(self.base, told.of_held(x)) * told.of_experts(shift)[: told.held]
            update = update + told.with_base(said).to(y.dtype)
        return y + told.summed(update)


def layer_kind(path: str, base: nn.Module, owner: FeedForward | None) -> type[MixtureLayer]:
    """Which mixture layer a layer becomes, by what it is and the part that it plays."""
    if owner is not None:
        return MixtureOutlet if path == owner.outlet else MixtureInlet
    return MixtureConv2d if isinstance(base, nn.Conv2d) else MixtureLinear


def feed_forwards(
    model: nn.Module, paths: Iterable[str], blocks: Collection[str]
) -> dict[str, FeedForward]:
    """The feed-forward that each linear layer belongs to, by the layer's path.

    It is the layer's nearest ancestor, inside a block, that maps a tensor to one like it, each
    position alone, and all of whose linear layers read its input, but the last, which writes its
    output. Modules are tried, not known by name.

    Args:
        model: The model.
        paths: The layers that are asked; those of no feed-forward are left out.
        blocks: Paths of the model's blocks.
    """
    tried: dict[str, FeedForward | None] = {}
    found = {}
    for path in paths:
        for above in _ancestors(path, blocks):
            if above not in tried:
                tried[above] = _tried(above, model.get_submodule(above))
            owner = tried[above]
            if owner is not None:
                found[path] = owner
                break
    return found


def _ancestors(path: str, blocks: Collection[str]) -> Iterator[str]:
    """The modules above a layer, the nearest first, inside the block that holds it."""
    while path := path.rpartition(".")[0]:
        if path in blocks or not any(path.startswith(f"{block}.") for block in blocks):
            return
        yield path


def _tried(path: str, module: nn.Module) -> FeedForward | None:
    """The module as a feed-forward, or None."""
    shapes = layer_shapes(module)
    if len(shapes) < 2:
        return None
    width = next(iter(shapes.values()))[1]
    found = trial(module, shapes, width)
    if found is None:
        return None
    inlets = [name for name in shapes if torch.equal(found.read[name], found.x)]
    last = [name for name in shapes if name not in inlets]
    if len(last) != 1 or not torch.equal(found.written[last[0]], found.y):
        return None
    return FeedForward(path, width, tuple(f"{path}.{name}" for name in inlets), f"{path}.{last[0]}")


class Trial(NamedTuple):
    """One call of a module, and of each of its layers by its name: what was read and written."""

    x: Tensor
    y: Tensor
    read: Mapping[str, Tensor]
    written: Mapping[str, Tensor]


@torch.no_grad()
def trial(module: nn.Module, names: Iterable[str], width: int) -> Trial | None:
    """A call on positions drawn at random; None where the module does not map each alone.

    Args:
        module: The module.
        names: Its linear layers' paths in it.
        width: Width of what it reads.
    """
    layers = {name: module.get_submodule(name) for name in names}
    weight = next(iter(layers.values())).weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, dtype)
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    def see(name: str, _layer: nn.Module, args: Sequence[Tensor], y: Tensor) -> None:
        read[name], written[name] = args[0], y

    modes = {part: part.training for part in module.modules()}
    module.eval()
    hooks = [layer.register_forward_hook(partial(see, name)) for name, layer in layers.items()]
    try:
        turned = module(x.flip(1))
        y = module(x)
    except Exception:
        return None
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    if not isinstance(y, Tensor) or y.shape != x.shape or read.keys() != layers.keys():
        return None
    alone = torch.allclose(turned.flip(1).float(), y.float(), rtol=1e-2, atol=1e-3)
    return Trial(x, y, read, written) if alone else None
