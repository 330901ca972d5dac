"""Which nonlinearity a feed-forward has between its layers: tried, not known by its class."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_vl.feedforward import FeedForward, trial

_TANH = partial(F.gelu, approximate="tanh")

NONLINEARITIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_accurate": _TANH,
    "gelu_fast": _TANH,
    "gelu_new": _TANH,
    "gelu_python": F.gelu,
    "gelu_pytorch_tanh": _TANH,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""Nonlinearities by the names that transformers has for them."""


@torch.no_grad()
def fault_of_nonlinearity(model: nn.Module, owner: FeedForward, name: str) -> str | None:
    """What speaks against a feed-forward's having the nonlinearity of this name, or None.

    It is called on positions drawn at random, and what its last layer reads is compared with what
    each nonlinearity makes of what its first layers write, gated or plain. GELU and its
    approximations may pass for one another.

    Args:
        model: The model, not mixed.
        owner: The feed-forward, as `feed_forwards` finds it.
        name: One of `NONLINEARITIES`.
    """
    if name not in NONLINEARITIES:
        return (
            f"the nonlinearity {name!r} is not known, expected one of {', '.join(NONLINEARITIES)}"
        )
    module = model.get_submodule(owner.path)
    *first, last = (path[len(owner.path) + 1 :] for path in (*owner.inlets, owner.outlet))
    found = trial(module, [*first, last], owner.width)
    assert found is not None
    read, written = found.read[last], [found.written[layer] for layer in first]
    errors = {
        name: min(_error(guess, read) for guess in _guesses(written, read.shape[-1], function))
        for name, function in NONLINEARITIES.items()
    }
    best = min(errors, key=errors.__getitem__)
    close = max(1e-4, torch.finfo(read.dtype).eps / 2)
    if errors[name] <= errors[best] + close:
        return None
    told = repr(best) if errors[best] <= close else "another one"
    return f"the nonlinearity is {name!r}, and {owner.path} has {told}"


def _guesses(
    written: Sequence[Tensor], width: int, function: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """What the last layer would read: of one piece its nonlinearity, the others its factors."""
    pieces = [piece.float() for one in written for piece in one.split(width, -1)]
    for place, piece in enumerate(pieces):
        others = pieces[:place] + pieces[place + 1 :]
        yield torch.stack([function(piece), *others]).prod(0)


def _error(guess: Tensor, read: Tensor) -> float:
    """The distance of a guess, in parts of what was read."""
    return float((guess - read.float()).norm() / read.float().norm().clamp_min(1e-12))
