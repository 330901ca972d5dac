"""What diffusers offers and a mixed pipeline cannot take as it is."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.utils import is_xformers_available

from mole_vl import Mixture


def _refused(method: str) -> Callable[..., Any]:
    def refusing(self: "Unmixable", *args: Any, **kwargs: Any) -> Any:
        if self.mixtures:
            raise RuntimeError(
                f"{method}() would change the layers under the mixed experts: use load_experts() "
                "for LoRAs, or unload_experts() first"
            )
        return getattr(super(Unmixable, self), method)(*args, **kwargs)

    refusing.__name__ = method
    refusing.__doc__ = f"diffusers' `{method}`, for a pipeline without experts."
    return refusing


class Unmixable:
    """diffusers' own handling of LoRAs, refused while experts are mixed in, and its kin."""

    @property
    @abstractmethod
    def mixtures(self) -> Mapping[str, Mixture]:
        """The handle of each mixed component."""

    load_lora_weights = _refused("load_lora_weights")
    unload_lora_weights = _refused("unload_lora_weights")
    fuse_lora = _refused("fuse_lora")
    unfuse_lora = _refused("unfuse_lora")
    set_adapters = _refused("set_adapters")
    delete_adapters = _refused("delete_adapters")
    enable_lora = _refused("enable_lora")
    disable_lora = _refused("disable_lora")

    def enable_xformers_memory_efficient_attention(self, *args: Any, **kwargs: Any) -> None:
        """Diffusers' own, mixed or not.

        Raises:
            ModuleNotFoundError: xformers is not installed.
        """
        if not is_xformers_available():
            raise ModuleNotFoundError(
                "enable_xformers_memory_efficient_attention: xformers is not installed (pip "
                "install xformers); torch's own attention, the default, needs as little memory",
                name="xformers",
            )
        parent: Any = super()
        parent.enable_xformers_memory_efficient_attention(*args, **kwargs)
