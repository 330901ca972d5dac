"""The mixture layers: a frozen linear layer or convolution, and the experts that change it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mole_vl.dora import Rescaling
from mole_vl.draws import dropout
from mole_vl.experts import Factors
from mole_vl.fanned import Fanned
from mole_vl.plans import align, dense, dense_conv, expand, in_order
from mole_vl.sparse import per_sample, sparse
from mole_vl.stack import Learning, Stack


class Chosen(NamedTuple):
    """The weights that a layer applies in a forward, the mixture's strength in them.

    Args:
        weights: (..., K).
        experts: Which expert each is for, (..., K), below 0, with weight 0, for nobody; None where
            all stand in order (K = E).
        fanned: In a feed-forward mixture, the positions that the layer reads, by expert.
        seeds: Of the rows, (rows,) int64, which their dropout is drawn from; None for torch's own
            generator.
    """

    weights: Tensor
    experts: Tensor | None
    fanned: Fanned | None = None
    seeds: Tensor | None = None


# Answers the weights for the forward that a layer is in; None where the mixture is switched off.
Route = Callable[[int], Chosen | None]


class MixtureLayer(nn.Module):
    """`y = W x + sum_e w_e s_e B_e (A_e x)`, with `w` asked of a route at every forward.

    The base layer stays as it is behind this one and keeps its own keys in `state_dict`. Frozen
    factors are buffers outside `state_dict`: they live in the experts' own files. `a` and `b` are
    all experts' factors along one rank axis.

    Args:
        path: The layer's path in its model, for messages.
        base: The layer, of any kind that shows `weight`.
        factors: One per expert in order; None where an expert leaves this layer alone.
        route: Gives the weights for a number of rows.
        learning: How the factors learn: each expert's are parameters then, in fp32, and part of
            `state_dict`. None for frozen ones.
    """

    def __init__(
        self,
        path: str,
        base: nn.Module,
        factors: Sequence[Factors | None],
        route: Route,
        learning: Learning | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.base = base
        self.route = route
        self.ranks = tuple(0 if f is None else f.rank for f in factors)
        weight = base.weight
        assert isinstance(weight, Tensor)
        exact = learning is not None or not weight.dtype.is_floating_point
        dtype = torch.float32 if exact else weight.dtype
        place: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        ranks = torch.tensor(self.ranks)
        self.stack = Stack([f and self._fitted(f) for f in factors], learning, place)
        self._shapes = (self.stack.a.shape[1], self.stack.b.shape[0])
        self.dropout = 0.0 if learning is None else learning.dropout
        segments = torch.repeat_interleave(torch.arange(len(ranks)), ranks).to(weight.device)
        self._exact_scales = torch.cat([torch.full((f.rank,), f.scale) for f in factors if f])
        scales = self._exact_scales.to(weight.device)
        self.register_buffer("segments", segments, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.rescaling = self._rescaling(factors, learning)
        self.register_state_dict_post_hook(_own_keys)
        self.register_load_state_dict_pre_hook(_base_keys)
        self.train(base.training)

    segments: Tensor
    scales: Tensor

    @property
    def a(self) -> Tensor:
        """All experts' down projections, (R, in) or (R, in, h, w)."""
        return self.stack.a

    @property
    def b(self) -> Tensor:
        """All experts' up projections, (out, R)."""
        return self.stack.b

    def _rescaling(
        self, factors: Sequence[Factors | None], learning: Learning | None
    ) -> Rescaling | None:
        magnitudes = [None if f is None else f.magnitude for f in factors]
        if all(magnitude is None for magnitude in magnitudes):
            return None
        return Rescaling(self.base, self.in_features, magnitudes, learning)

    @abstractmethod
    def _fitted(self, factors: Factors) -> Factors:
        """The factors in the shape that the layer computes with."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MixtureLayer":
        # A model cast to half precision keeps its experts' scales exact: they are no weights.
        super()._apply(fn, recurse)
        self.scales = self._exact_scales.to(self.segments.device)
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
        """Width, or channels, that the layer reads."""
        return self._shapes[0]

    @property
    def out_features(self) -> int:
        """Width, or channels, that the layer writes."""
        return self._shapes[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the mixture's update."""
        told = self.route(x.shape[0])
        if told is not None and told.fanned is not None:
            return self.fanned(x, told.fanned)
        y = self.base(x, *args, **kwargs)
        if told is None:
            return y
        # Constant weights are found before a model is moved that moves when it is called.
        weights = told.weights.to(x.device)
        experts = None if told.experts is None else told.experts.to(x.device)
        if self.training and self.dropout:
            seeds = None if told.seeds is None else told.seeds.to(x.device)
            x = dropout(x, self.dropout, seeds, self.path)
        return y + self._update(x, weights, experts, y).to(y.dtype)

    def fanned(self, x: Tensor, told: Fanned) -> Tensor:
        """The layer in a feed-forward that runs once for each expert: see `mole_vl.feedforward`."""
        raise AssertionError(f"{self.path} is no part of a feed-forward mixture")

    @abstractmethod
    def _update(self, x: Tensor, weights: Tensor, experts: Tensor | None, y: Tensor) -> Tensor:
        """What the experts add to the base layer's output `y`; other arguments as of `Chosen`."""

    @abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """The layer's input as a gate reads it: (rows, positions, width), or (rows, width)."""

    @property
    @abstractmethod
    def reading(self) -> Tensor:
        """The down projections as they meet one position that stands for all, (R, in)."""

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names in `state_dict` of what is not the base's: factors that learn."""
        return tuple(n for n, _ in self.named_parameters() if not n.startswith("base."))

    def part(self, expert: int) -> Factors | None:
        """An expert's part of the layer's factors; None where it leaves the layer alone."""
        own = slice(sum(self.ranks[:expert]), sum(self.ranks[: expert + 1]))
        if own.start == own.stop:
            return None
        magnitude = None if self.rescaling is None else self.rescaling.of(expert)
        scale = float(self._exact_scales[own.start])
        return Factors(self.a[own], self.b[:, own], scale, magnitude)

    def factors(self, expert: int) -> Factors | None:
        """An expert's factors as they are now, copied; None where it leaves the layer alone."""
        own = self.part(expert)
        if own is None:
            return None
        copied = {
            name: one.detach().clone(memory_format=torch.contiguous_format)
            for name, one in own.tensors().items()
        }
        return replace(own, **copied)

    def stacked(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of Delta-W under constant weights (E,): a (R, ...) and b (out, R), in fp32.

        Raises:
            ValueError: One of the experts is a DoRA, whose Delta-W is of full rank.
        """
        if self.rescaling is not None:
            raise ValueError(
                f"{self.path}: a DoRA rescales the base's whole weight, which no low rank holds"
            )
        rank_weights = expand(weights.float().to(self.scales.device), self.segments, self.scales)
        return self.a.float(), self.b.float() * rank_weights

    def delta(self, weights: Tensor) -> Tensor:
        """Delta-W of constant weights (E,): `sum_e w_e s_e B_e A_e`, like the weight, in fp32."""
        a, b = self.stacked(weights)
        return (b @ a.flatten(1)).view(self.out_features, *a.shape[1:])

    def responses_gram(self) -> Tensor:
        """Inner products of the columns of `s_e B_e` within each expert, (R, R), in fp32."""
        columns = self.b.float() * self.scales
        same = self.segments[:, None] == self.segments[None, :]
        return torch.where(same, columns.T @ columns, 0.0)

    def extra_repr(self) -> str:
        """What `print(model)` says of the layer."""
        return f"ranks={self.ranks}"


class MixtureLinear(MixtureLayer):
    """The mixture over a linear layer, one of any kind that maps the last axis."""

    def _fitted(self, factors: Factors) -> Factors:
        return factors.fitted(factors.shape[:2])

    def _update(self, x: Tensor, weights: Tensor, experts: Tensor | None, y: Tensor) -> Tensor:
        shift = self.shift()
        if shift is None:
            return self._low_rank(x, weights, experts, self.b)
        every = align(in_order(weights, experts, len(self.ranks)), x, self.path)
        rescaled = self.unbiased(y) * (every @ shift).to(y.dtype)
        return self._low_rank(x, weights, experts, self.rescaled_b(shift)).to(y.dtype) + rescaled

    def shift(self) -> Tensor | None:
        """What DoRAs rescale the base's output by, less 1, (E, out); None where none is one."""
        if self.rescaling is None:
            return None
        return self.rescaling(self.base, self.a, self.b, self.scales, self.segments)

    def rescaled_b(self, shift: Tensor) -> Tensor:
        """The up projections, (out, R), their rows multiplied as DoRAs do it."""
        return self.b * (1 + shift[self.segments].T).to(self.b.dtype)

    def unbiased(self, y: Tensor) -> Tensor:
        """The base's output without its bias."""
        return y if self.bias is None else y - self.bias

    def _low_rank(self, x: Tensor, weights: Tensor, experts: Tensor | None, b: Tensor) -> Tensor:
        aligned = align(weights, x, self.path)
        if experts is None:
            return dense(x, self.a, b, expand(aligned, self.segments, self.scales))
        of_expert = self.scales.new_zeros(len(self.ranks)).scatter(0, self.segments, self.scales)
        scaled = weights * of_expert[experts.clamp_min(0)]
        if weights.dim() == 2:
            return per_sample(x, self.a, b, scaled, experts, self.ranks)
        # A layer may read more axes than its gate weighs: each place has its position's experts.
        scaled, experts = (
            align(one, x, self.path).expand(*x.shape[:-1], -1) for one in (scaled, experts)
        )
        return sparse(x, self.a, b, scaled, experts, self.ranks)

    def positions(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x

    def delta(self, weights: Tensor) -> Tensor:
        """Delta-W of constant weights (E,), lying as the base's weight does, in fp32."""
        turned, shift = is_transposed(self.base), self.shift()
        if shift is None:
            delta = super().delta(weights)
            return delta.T if turned else delta
        weights = weights.float().to(shift.device)
        own = self.weight.float().T if turned else self.weight.float()
        ranks = expand(weights, self.segments, self.scales)
        delta = (self.rescaled_b(shift).float() * ranks) @ self.a.float()
        delta = delta + (weights @ shift).unsqueeze(-1) * own
        return delta.T if turned else delta

    @property
    def reading(self) -> Tensor:
        """The down projections, (R, in)."""
        return self.a

    def updates(self, x: Tensor, told: Fanned, shift: Tensor | None) -> Tensor:
        """Every expert's update of what it reads, (1, m, i), unweighed: (1, m, o).

        Of a DoRA, what its factors add; `told.of_experts(shift)` times the base's output is beside.
        """
        if self.training and self.dropout:
            x = told.dropout(x, self.dropout, self.path)
        own = self.scales.new_zeros(len(self.ranks)).scatter(0, self.segments, self.scales)
        b = self.b if shift is None else self.rescaled_b(shift)
        return told.updates(x, self.a, b, own, self.ranks)


class MixtureConv2d(MixtureLayer):
    """The mixture over a convolution: `A_e` is one of the same kernel and stride, `B_e` of pixels.

    Gates over rows alone: a picture's weights are those of all its pixels.
    """

    base: nn.Conv2d

    def _fitted(self, factors: Factors) -> Factors:
        if factors.magnitude is not None:
            raise ValueError(f"{self.path}: a DoRA of a convolution is not known here")
        return factors.fitted(self.weight.shape)

    def _update(self, x: Tensor, weights: Tensor, experts: Tensor | None, y: Tensor) -> Tensor:
        if weights.dim() > 2:
            raise ValueError(
                f"{self.path}: its gate's weights vary by position, and a convolution mixes the "
                "positions that it reads; use a gate over rows"
            )
        weights = align(in_order(weights, experts, len(self.ranks)), x, self.path)
        rank_weights = expand(weights, self.segments, self.scales)
        return dense_conv(x, self.a, self.b, rank_weights.movedim(-1, 1), self.base)

    def positions(self, x: Tensor) -> Tensor:
        """The pixels as positions, (rows, h * w, channels)."""
        return x.flatten(2).transpose(1, 2)

    @property
    def reading(self) -> Tensor:
        """The kernels' sums: the response to a picture that is the same everywhere, (R, in)."""
        return self.a.sum((2, 3))


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


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight lies as (in, out), as transformers' `Conv1D`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def layer_shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Shape of Delta-W of every layer of a model that can take experts, by path.

    These are its linear layers and its plain convolutions over pictures. Without those that
    torch's own attention and encoder layers read past their forward: experts there would stay
    silent.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parent = model.get_submodule(path.rpartition(".")[0])
            if not isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
                found[path] = (module.out_features, module.in_features)
        elif is_transposed(module):
            width, out = module.get_parameter("weight").shape
            found[path] = (out, width)
        elif isinstance(module, nn.Conv2d) and _plain(module):
            found[path] = tuple(module.weight.shape)
    return found


def _plain(conv: nn.Conv2d) -> bool:
    # In groups, A of each expert would have to know them; peft pads with zeros whatever the base.
    return conv.groups == 1 and conv.padding_mode == "zeros"
