"""What a model itself is told at each forward, as features for its gates.

The core does not know what it is: a domain reads it from the forward's own arguments (a time step,
say), so that whoever calls the model need tell the gates nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class Features(Protocol):
    """Numbers read from the arguments of each forward of a mixed model, the same for all gates.

    They are read once a forward, or once a preview if they are `held`. A copy of the model copies
    them with it.
    """

    @property
    def name(self) -> str:
        """What they are: gate files and errors say it."""
        ...

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        ...

    @property
    def held(self) -> bool:
        """Whether they are told once for all forwards of a row, by what site preview is shown.

        Others change with every forward, and site preview cannot have them.
        """
        ...

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The features (rows, width) of a forward, by its arguments and keywords."""
        ...


def read_features(features: Features, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The features (rows, width) of a forward, in fp32.

    Raises:
        ValueError: They are of another shape than they say.
    """
    found = features(args, kwargs)
    if found.dim() != 2 or found.shape[1] != features.width:
        raise ValueError(
            f"the features {features.name!r} of a forward are of shape {tuple(found.shape)}, "
            f"expected (rows, {features.width})"
        )
    return found.float()
