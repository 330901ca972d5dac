"""An expert: one LoRA as named low-rank factors."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from mole_vl.faults import plain_word, refuse, some


@dataclass(frozen=True)
class Factors:
    """One layer's low-rank update, Delta-W = scale * b @ a; of a DoRA, its part.

    Args:
        a: Down projection, (rank, in_features); of a convolution, (rank, in_channels, h, w), a
            convolution itself whose kernel is the layer's.
        b: Up projection, (out_features, rank); a convolution's is one of single pixels.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        magnitude: Of a DoRA, the norm of each row of the changed weight, (out_features,).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.dim() not in (2, 4) or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"factors of shapes a {tuple(self.a.shape)}, b {tuple(self.b.shape)}: expected "
                "(rank, in) or a convolution's (rank, in, h, w), and (out, rank)"
            )
        if self.magnitude is not None and self.magnitude.shape != (self.b.shape[0],):
            raise ValueError(
                f"a magnitude of shape {tuple(self.magnitude.shape)}, expected ({self.b.shape[0]},)"
            )

    def __repr__(self) -> str:
        dora = "" if self.magnitude is None else ", DoRA"
        shapes = f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}"
        return f"Factors({shapes}, scale={self.scale}{dora})"

    def tensors(self) -> dict[str, Tensor]:
        """Down and up projection, and a DoRA's magnitude."""
        magnitude = {} if self.magnitude is None else {"magnitude": self.magnitude}
        return {"a": self.a, "b": self.b, **magnitude}

    @property
    def rank(self) -> int:
        """Inner dimension of the update."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of Delta-W, (out_features, in_features) or (out, in, h, w)."""
        return self.b.shape[0], *self.a.shape[1:]

    def delta(self) -> Tensor:
        """Delta-W itself, of the layer's weight's shape, in fp32.

        Raises:
            ValueError: A DoRA's, which is not known without the base's weight.
        """
        if self.magnitude is not None:
            raise ValueError(
                "a DoRA's Delta-W hangs on the base: mix it, and ask the layer's delta"
            )
        return self.scale * (self.b.float() @ self.a.float().flatten(1)).view(self.shape)

    def fitted(self, shape: Sequence[int]) -> "Factors":
        """The same update of a layer whose weight has this shape.

        A convolution of single pixels is a linear layer over channels: files write either.

        Raises:
            ValueError: The update is of another shape.
        """
        if self.shape == tuple(shape):
            return self
        if _channels(self.shape) != _channels(shape):
            raise ValueError(f"an update of shape {self.shape}, expected {tuple(shape)}")
        return replace(self, a=self.a.reshape(self.rank, *shape[1:]))


@dataclass(frozen=True)
class Expert:
    """A LoRA by name: factors for each layer that it changes, by the layer's path in its model.

    Args:
        name: How masks, pins, gate files and pictures call it.
        layers: Factors by module path, such as `model.layers.0.self_attn.q_proj`.
        base: Name of the base model it was trained on, where known.
        source: Where it was read from, for messages.
    """

    name: str
    layers: Mapping[str, Factors]
    base: str | None = None
    source: str = field(default="memory", compare=False)

    def __post_init__(self) -> None:
        refuse("Expert", [plain_word("name", self.name)])
        if not self.layers:
            raise ValueError(f"expert {self.name!r} from {self.source} changes no layer")
        for path, factors in self.layers.items():
            for letter, factor in factors.tensors().items():
                if not factor.is_floating_point():
                    raise ValueError(
                        f"expert {self.name!r} from {self.source}: factor {letter} of {path} is "
                        f"of {factor.dtype}, expected floating-point numbers"
                    )
                if not torch.isfinite(factor).all():
                    raise ValueError(
                        f"expert {self.name!r} from {self.source}: factor {letter} of {path} "
                        "holds NaN or infinite numbers"
                    )

    def __repr__(self) -> str:
        ranks = sorted({factors.rank for factors in self.layers.values()})
        listed = ", ".join(map(str, ranks))
        return f"Expert({self.name!r}, {len(self.layers)} layers of rank {listed}, {self.source})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of paths, scales and factors (as fp32): the same Delta-W written the same way."""
        state = hashlib.sha256()
        for path, factors in sorted(self.layers.items()):
            state.update(
                f"{path} {tuple(factors.a.shape)} {factors.shape} {factors.scale!r}".encode()
            )
            for factor in factors.tensors().values():
                state.update(factor.detach().float().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()

    def renamed(self, paths: Mapping[str, str]) -> "Expert":
        """The same expert with layer paths replaced (paths not named stay)."""
        layers = {paths.get(path, path): factors for path, factors in self.layers.items()}
        return Expert(self.name, layers, self.base, self.source)


def _channels(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


def check_names(experts: Sequence[Expert]) -> None:
    """Raise ValueError unless these are experts, at least one, and all names differ."""
    if isinstance(experts, str | Expert):
        raise ValueError(f"experts is a {type(experts).__name__}, expected a list of Expert")
    refuse(
        "experts",
        [
            f"expert {number} is a {type(expert).__name__}, expected an Expert: read it with "
            "read_peft(path), or take a component of read_components(path)"
            for number, expert in enumerate(experts)
            if not isinstance(expert, Expert)
        ],
    )
    if not experts:
        raise ValueError("a mixture needs at least one expert, got none")
    names = [expert.name for expert in experts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"experts share the names {', '.join(twice)}: each needs its own")


def faults_of_form(here: Expert, there: Expert) -> list[str]:
    """What keeps an expert that was saved from being gone on with: other layers, ranks, scales."""
    odd = here.layers.keys() ^ there.layers.keys()
    faults = [f"{here.name} is not on the same layers: {some(sorted(odd))}"] if odd else []
    for path, own in here.layers.items():
        saved = there.layers.get(path, own)
        # A scale may have passed a file as an alpha.
        if saved.rank != own.rank or not math.isclose(saved.scale, own.scale):
            return [
                *faults,
                f"{here.name} at {path} has rank {saved.rank} and scale {saved.scale:g} there, "
                f"{own.rank} and {own.scale:g} here",
            ]
        if saved.tensors().keys() != own.tensors().keys():
            return [*faults, f"{here.name} at {path} is a DoRA on one side alone"]
    return faults


def check_fit(experts: Sequence[Expert], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless every factor of every expert fits a layer of the model.

    Args:
        experts: The experts to be mixed.
        shapes: Shape of the weight of every layer of the model that can take experts, by path.
    """
    for expert in experts:
        known = [path for path in expert.layers if path in shapes]
        strange = sorted(set(expert.layers) - set(known))
        where = f"expert {expert.name!r} from {expert.source}"
        if not known:
            raise ValueError(
                f"{where} matches no layer of this model: it changes {some(strange)}; "
                f"the model has {some(shapes)}. It was made for another kind of base"
            )
        if strange:
            raise ValueError(
                f"{where} changes {len(strange)} layers that this model lacks, or that take no "
                f"experts: {some(strange)}"
            )
        for path, factors in expert.layers.items():
            try:
                factors.fitted(shapes[path])
            except ValueError as fault:
                raise ValueError(
                    f"{where}: {path} has {fault} of this model's layer. It was made for another "
                    "base"
                ) from fault
