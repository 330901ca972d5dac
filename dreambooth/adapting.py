"""LoRAs in training: peft's layers in a base, for the length of a block."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn

from dreambooth.base import Base
from dreambooth.candidates import CandidateConfig, TextLora
from mole_vl import Expert, trained_expert
from mole_vl.targets import check_targets

_Kind = CandidateConfig | TextLora


def adapted_parts(base: Base, candidate: CandidateConfig) -> dict[str, tuple[nn.Module, _Kind]]:
    """The networks that get a LoRA, and its settings, by component."""
    parts: dict[str, tuple[nn.Module, _Kind]] = {"unet": (base.unet, candidate)}
    if candidate.text is not None:
        for component, encoder in base.text_encoders.items():
            parts[component] = (encoder, candidate.text)
    return parts


def check_candidate(base: Base, candidate: CandidateConfig) -> None:
    """Raise ValueError unless each target names layers that a pair can be put on."""
    for component, (network, kind) in adapted_parts(base, candidate).items():
        name = candidate.name if component == "unet" else f"{candidate.name} ({component})"
        check_targets(network, name, kind.targets, convolutions=component == "unet")


@dataclass(frozen=True)
class Adapted:
    """A LoRA in training.

    Args:
        parameters: Its factors, by component and path.
        networks: The networks that carry it, by component.
    """

    parameters: Mapping[str, nn.Parameter]
    networks: Mapping[str, nn.Module]

    def experts(self, name: str, base: str) -> dict[str, Expert]:
        """The LoRA as it is trained now, by component."""
        return {
            component: trained_expert(network, name, base)
            for component, network in self.networks.items()
        }


@contextmanager
def adapted(base: Base, candidate: CandidateConfig, checkpointing: bool) -> Iterator[Adapted]:
    """The base with fresh factors in its layers; afterwards it is as it was.

    Their start is drawn from torch's generator, the UNet's first.
    """
    with ExitStack() as after:
        parts = adapted_parts(base, candidate)
        for network, kind in parts.values():
            lora = LoraConfig(
                r=kind.rank,
                lora_alpha=kind.alpha,  # pyright: ignore[reportArgumentType] (peft divides it, no more)
                target_modules=list(kind.targets),
            )
            model = get_peft_model(network, lora)  # pyright: ignore[reportArgumentType] (any module)
            after.callback(model.unload)
            if checkpointing:
                after.enter_context(_checkpointed(network))
        parameters = {
            f"{component}.{path}": parameter
            for component, (network, _) in parts.items()
            for path, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        yield Adapted(parameters, {component: network for component, (network, _) in parts.items()})


@contextmanager
def _checkpointed(network: Any) -> Iterator[None]:
    """Checkpointing of torch's non-reentrant kind, which diffusers takes by itself."""
    if isinstance(network, UNet2DConditionModel):
        network.enable_gradient_checkpointing()
        try:
            yield
        finally:
            network.disable_gradient_checkpointing()
        return
    # transformers checkpoints in training mode alone; Stable Diffusion's text encoders have no
    # dropout that would come with it.
    network.activation_checkpointing_enable({"use_reentrant": False})
    network.train()
    try:
        yield
    finally:
        network.eval()
        network.activation_checkpointing_disable()
