"""What a forward's own arguments tell of its rows, where nobody else does.

A caller that knows nothing of mixtures (another library's loop, a stream server) says which
positions are padding and which forwards belong together by what it hands the model anyway. The
core does not know these arguments: a domain reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from mole_vl.passes import Masks


@dataclass(frozen=True)
class Call:
    """What one forward tells.

    Args:
        masks: Which positions count.
        thread: What all forwards that go on from the same beginning are handed, such as a cache:
            row weights of the first hold for all. None for a forward by itself.
        first: Whether this forward is a thread's first: what an older one left is forgotten.
        preview: Arguments of a forward that shows a preview the same rows and leaves no trace.
    """

    masks: Masks = Masks()
    thread: object | None = None
    first: bool = True
    preview: Mapping[str, Any] = field(default_factory=dict)


class Calls(Protocol):
    """Reads a model's calls."""

    def __call__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """What a forward of the model with these arguments tells."""
        ...
