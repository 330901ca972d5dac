"""The mixture layer: a frozen linear layer and the experts that change it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mole_vl.experts import Factors
from mole_vl.plans import align, dense, expand

# Answers the weights that a layer applies to the forward it is in, (..., E), with the mixture's
# strength in them; None where the mixture is switched off.
Route = Callable[[int], Tensor | None]


class MixtureLinear(nn.Module):
    """`y = W x + sum_e w_e s_e B_e (A_e x)`, with `w` asked of a route at every forward.

    The base layer stays as it is behind this one and keeps its own keys in `state_dict`. Frozen
    factors are buffers outside `state_dict`: they live in the experts' own files.

    Args:
        path: The layer's path in its model, for messages.
        base: The linear layer, of any kind that shows `weight` (or `in_features`) and maps the
            last axis.
        factors: One per expert in order; None where an expert leaves this layer alone.
        route: Gives the weights for a number of rows.
    """

    def __init__(
        self, path: str, base: nn.Module, factors: Sequence[Factors | None], route: Route
    ) -> None:
        super().__init__()
        self.path = path
        self.base = base
        self.route = route
        self.ranks = tuple(0 if f is None else f.rank for f in factors)
        present = [f for f in factors if f is not None]
        weight = base.weight
        assert isinstance(weight, Tensor)
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        place: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        ranks = torch.tensor(self.ranks)
        self.register_buffer("a", torch.cat([f.a.to(**place) for f in present]), persistent=False)
        self.register_buffer(
            "b", torch.cat([f.b.to(**place) for f in present], dim=1), persistent=False
        )
        segments = torch.repeat_interleave(torch.arange(len(ranks)), ranks).to(weight.device)
        self._exact_scales = torch.cat([torch.full((f.rank,), f.scale) for f in present])
        scales = self._exact_scales.to(weight.device)
        self.register_buffer("segments", segments, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_state_dict_post_hook(_own_keys)
        self.register_load_state_dict_pre_hook(_base_keys)
        self.train(base.training)

    a: Tensor
    b: Tensor
    segments: Tensor
    scales: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MixtureLinear":
        # A model cast to half precision keeps its experts' scales exact: they are no weights.
        super()._apply(fn, recurse)
        self.scales = self._exact_scales.to(self.a.device)
        return self

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias  # pyright: ignore[reportReturnType]

    @property
    def in_features(self) -> int:
        """Width that the layer reads."""
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        """Width that the layer writes."""
        return self.b.shape[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the mixture's update, (..., out_features)."""
        y = self.base(x, *args, **kwargs)
        weights = self.route(x.shape[0])
        if weights is None:
            return y
        rank_weights = expand(align(weights, x, self.path), self.segments, self.scales)
        return y + dense(x, self.a, self.b, rank_weights).to(y.dtype)

    def delta(self, weights: Tensor) -> Tensor:
        """Delta-W of constant weights (E,): `sum_e w_e s_e B_e A_e`, (out, in), in fp32."""
        rank_weights = expand(weights.float().to(self.scales.device), self.segments, self.scales)
        return (self.b.float() * rank_weights) @ self.a.float()

    def responses_gram(self) -> Tensor:
        """Inner products of the columns of `s_e B_e` within each expert, (R, R), in fp32."""
        columns = self.b.float() * self.scales
        same = self.segments[:, None] == self.segments[None, :]
        return torch.where(same, columns.T @ columns, 0.0)

    def extra_repr(self) -> str:
        """What `print(model)` says of the layer."""
        return f"ranks={self.ranks}"


def _own_keys(module: nn.Module, state: Any, prefix: str, _meta: Any) -> None:
    """Write the base layer's keys as if it stood here itself."""
    inner = f"{prefix}base."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def _base_keys(module: nn.Module, state: Any, prefix: str, *_rest: Any) -> None:
    """Read the base layer's keys from where the base model has them."""
    base = module.base
    assert isinstance(base, nn.Module)
    for name in base.state_dict():
        if prefix + name in state:
            state[f"{prefix}base.{name}"] = state.pop(prefix + name)


def linear_shapes(model: nn.Module) -> Mapping[str, tuple[int, int]]:
    """(out_features, in_features) of every linear layer of a model, by path.

    Without those that torch's own attention and encoder layers read past their forward: experts
    there would stay silent.
    """
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        if not isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            found[path] = (module.out_features, module.in_features)
    return found
