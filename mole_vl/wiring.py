"""What a mixture changes of a model, and the way back."""

from collections.abc import Mapping
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from mole_vl.dispatch import Dispatch
from mole_vl.layers import MixtureLayer

ATTRIBUTE = "mixture"
# Methods of other libraries that read layers' weights past their forward: experts would fall mute.
_PAST_FORWARD = ("fuse_qkv_projections",)


class Wiring:
    """A model with mixture layers in its layers' places, hooks for gates, and a frozen base.

    Args:
        model: Changed in place.
        handle: Registered on it.
        layers: The mixture layers by path.
        dispatch: Hooked into its forward.
    """

    def __init__(
        self,
        model: nn.Module,
        handle: nn.Module,
        layers: Mapping[str, MixtureLayer],
        dispatch: Dispatch,
    ) -> None:
        self.model = model
        self.paths = frozenset(path for path, _ in model.named_modules())
        self._layers = layers
        self._trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        # The base's weights as they were before a sum was folded into them.
        self._originals: dict[str, Tensor] = {}
        for path, layer in layers.items():
            put_module(model, path, layer)
        self._hooks = dispatch.attach(model)
        model.requires_grad_(False)
        for layer in layers.values():
            for name in layer.own_names:
                layer.get_parameter(name).requires_grad_(True)
        for name in _PAST_FORWARD:
            if hasattr(model, name):
                setattr(model, name, partial(_refuse, name))
        model.add_module(ATTRIBUTE, handle)

    def base_state_dict(self) -> dict[str, Tensor]:
        """The base model's own state under its own keys."""
        state = self.model.state_dict()
        own = {f"{path}.{name}" for path, layer in self._layers.items() for name in layer.own_names}
        return {
            key: value
            for key, value in state.items()
            if not key.startswith(f"{ATTRIBUTE}.") and key not in own
        }

    def check_foldable(self) -> None:
        """Raise ValueError or RuntimeError where a sum must not be folded into the base."""
        if self._originals:
            raise RuntimeError("this mixture is baked already: unmix() gives the base back")
        quantised = [p for p, m in self._layers.items() if not m.weight.is_floating_point()]
        if quantised:
            raise ValueError(f"bake: {quantised[0]} is quantised and cannot take a sum")
        own = {id(layer.weight) for layer in self._layers.values()}
        names = [n for n, p in self.model.named_parameters(remove_duplicate=False) if id(p) in own]
        if len(names) > len(self._layers):
            raise ValueError(
                "bake: a layer with experts shares its weight with another module, which the sum "
                f"would change too (among {', '.join(names[:4])})"
            )

    @torch.no_grad()
    def fold(self, weights: Mapping[str, Tensor]) -> None:
        """Add each layer's update, under its weights (E,), to its base's weight."""
        # All sums first: a fault in one leaves every base as it was.
        sums = {
            path: layer.weight.float() + layer.delta(weights[path])
            for path, layer in self._layers.items()
        }
        for path, total in sums.items():
            own = self._layers[path].weight
            self._originals[path] = own.detach().clone()
            own.copy_(total.to(own.dtype))

    @torch.no_grad()
    def undo(self) -> nn.Module:
        """Give the base model back, bit for bit."""
        for path, weight in self._originals.items():
            self._layers[path].weight.copy_(weight)
        for hook in self._hooks:
            hook.remove()
        for path, layer in self._layers.items():
            put_module(self.model, path, layer.base)
        delattr(self.model, ATTRIBUTE)
        for name in _PAST_FORWARD:
            self.model.__dict__.pop(name, None)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        return self.model


def _refuse(method: str) -> NoReturn:
    raise RuntimeError(
        f"{method}() on a mixed model would read the base's weights past its experts: bake() or "
        "unmix() the mixture first"
    )


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule at `path`."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
