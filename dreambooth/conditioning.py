"""What a UNet is told at each call, as features for its gates: the time step and the prompt.

Both are read from the UNet's own arguments, so that any pipeline that calls it, and any sampler
however often it calls, tells its gates what they were trained with.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mole_vl.faults import at_least, one_of, refuse
from mole_vl.gate_file import GateFile
from mole_vl.gates.pooling import pooled_mean
from mole_vl.gates.scores import unit_sized

Told = Literal["time", "prompt"]

# Half waves over the whole of time: gates should change smoothly from step to step.
_WAVES = 8
_JOINED = "+"
_READ: Mapping[str, tuple[str, ...]] = {
    "time": ("sample", "timestep"),
    "prompt": ("encoder_hidden_states",),
}


@dataclass(frozen=True)
class UNetFeatures:
    """Features of a UNet's calls.

    Args:
        told: What is read, in the order of the features.
        forward: The forward of the UNet's class, for the names of its arguments.
        steps: T: time steps are 0 to T - 1.
        states: Width of the encoded prompt's positions.
    """

    told: tuple[Told, ...]
    forward: Callable[..., Any]
    steps: int
    states: int

    @property
    def name(self) -> str:
        """Such as `time+prompt`."""
        return _JOINED.join(self.told)

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        widths = {"time": 2 * _WAVES, "prompt": self.states}
        return sum(widths[word] for word in self.told)

    @property
    def held(self) -> bool:
        """No: the time step changes with every call."""
        return False

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The features (rows, width) of a call with these arguments."""
        given = signature(self.forward).bind(None, *args, **kwargs).arguments
        found: list[Tensor] = []
        for word in self.told:
            if word == "time":
                found.append(waves(self._shares(given["sample"], given["timestep"])))
            else:
                mask = given.get("encoder_attention_mask")
                states: Tensor = given["encoder_hidden_states"]
                found.append(pooled(states, None if mask is None else mask.bool()))
        return torch.cat(found, -1)

    def _shares(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """How noisy each row is told to be, (rows,), from 0 to 1; one time step serves all rows."""
        steps = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        return steps.expand(len(sample)) / self.steps


def waves(shares: Tensor) -> Tensor:
    """Cosines and sines of 1 to 8 half waves over [0, 1]: (rows,) to (rows, 16)."""
    numbers = torch.arange(1, _WAVES + 1, device=shares.device)
    angles = math.pi * shares[:, None] * numbers
    return torch.cat([angles.cos(), angles.sin()], -1)


def pooled(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """An encoded prompt (rows, positions, d) as one direction of unit size, (rows, d).

    Without a mask every position counts, as it does for a UNet that is given none: the text encoder
    pads all prompts to one length, and padding repeats what the whole prompt says.
    """
    return unit_sized(pooled_mean(states, mask))


def unet_features(unet: nn.Module, told: Sequence[str], steps: int) -> UNetFeatures | None:
    """The features of a UNet's calls, or None where nothing is to be read.

    Args:
        unet: Is told a time step and a prompt.
        told: `time`, `prompt`, or both, in any order.
        steps: T: time steps are 0 to T - 1.

    Raises:
        ValueError: Other words, or a model that is not told of them.
    """
    return _features("conditioning", unet, told, steps)


def features_of_file(gates: GateFile, unet: nn.Module, steps: int) -> UNetFeatures | None:
    """The features that a gate file names; arguments as of `unet_features`.

    Raises:
        ValueError: A name that is not known here, or not of this model.
    """
    told = [] if gates.features is None else gates.features.split(_JOINED)
    return _features(f"{gates.source}: features", unet, told, steps)


def told_faults(told: Sequence[str]) -> list[str | None]:
    """What is wrong with a list of what gates are conditioned on."""
    twice = len(set(told)) < len(told)
    return [
        *(one_of("conditioning", word, get_args(Told)) for word in told),
        f"conditioning names {', '.join(told)}, expected each once" if twice else None,
    ]


def _features(
    subject: str, unet: nn.Module, told: Sequence[str], steps: int
) -> UNetFeatures | None:
    refuse(subject, told_faults(told))
    if not told:
        return None
    forward = type(unet).forward
    arguments = signature(forward).parameters
    missing = [
        f"{type(unet).__name__} is told no {argument}, which {word!r} is read from"
        for word in told
        for argument in _READ[word]
        if argument not in arguments
    ]
    refuse(subject, [at_least("steps", steps, 1), *missing])
    ordered = tuple(word for word in get_args(Told) if word in told)
    return UNetFeatures(ordered, forward, steps, _states(unet) if "prompt" in told else 0)


def _states(unet: nn.Module) -> int:
    config: Any = unet.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    # A tuple by block: all read the same prompt.
    return width if isinstance(width, int) else width[0]
