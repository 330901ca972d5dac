"""The tensor that a module of a model is called with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mole_vl.layers import MixtureLayer


def swapped(args: Any, kwargs: Mapping[str, Any], x: Tensor, new: Tensor) -> tuple[Any, Any]:
    """A call's arguments with another tensor in x's place."""
    return (
        tuple(new if value is x else value for value in args),
        {name: new if value is x else value for name, value in kwargs.items()},
    )


def site_input(module: nn.Module, args: Any, kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The tensor that a site's module is called with."""
    for value in (*args, kwargs.get("hidden_states"), kwargs.get("x"), kwargs.get("input")):
        if isinstance(value, Tensor):
            return module.positions(value) if isinstance(module, MixtureLayer) else value
    raise RuntimeError(
        f"site {name!r}: {type(module).__name__} was called without a tensor that its gate could "
        f"read (keywords: {', '.join(kwargs) or 'none'})"
    )
