"""Experts and gates in a pipeline: loading, gating, unloading."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mole_vl import Mixture
from mole_vl.gates import Average, GateSpec
from mole_vl.sites import SiteKind
from pipelines.loading import Bank, fitting, gate_parts, mix_parts
from pipelines.parts import PARTS, Source, read_experts
from pipelines.unmixable import Unmixable


class BearsExperts(Unmixable):
    """A pipeline whose UNet and text encoders may carry experts."""

    # A pipeline's __init__ says what its components are, so this class has none.
    _bank: Bank | None = None

    @property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The handle of each mixed component."""
        found = {part: getattr(model, "mixture", None) for part, model in self._models().items()}
        return {part: mixture for part, mixture in found.items() if isinstance(mixture, Mixture)}

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts: the order of weights."""
        mixed = [name for mixture in self.mixtures.values() for name in mixture.names]
        return tuple(dict.fromkeys([*(self._bank or ()), *mixed]))

    def load_experts(
        self,
        experts: Sequence[Source] | Mapping[str, Source],
        *,
        gate: GateSpec = Average(),  # noqa: B008 (frozen)
        site: SiteKind = "block",
        after: int = 0,
        parts: Sequence[str] | None = None,
    ) -> None:
        """Mix LoRAs into the UNet and, where they have that part, into the text encoders.

        Args:
            experts: LoRA folders or files (PEFT's, diffusers', kohya's), under their own names, or
                under the keys of a mapping.
            gate: What decides the weights, until `load_gates`.
            site: As for `mole_vl.mix`.
            after: As for `mole_vl.mix`.
            parts: Components to mix; all that the experts change if not given.

        Raises:
            FileNotFoundError: No LoRA there.
            ValueError: Experts that do not fit the pipeline; it is left as it was.
            RuntimeError: There are experts already, or other LoRAs, or weights are offloaded.
        """
        if self.mixtures:
            raise RuntimeError(
                f"experts are loaded already ({', '.join(self.experts)}): call unload_experts() "
                "first"
            )
        models = self._models()
        config: Any = models["unet"].config
        bank = fitting(read_experts(experts, config), models, parts)
        mix_parts(bank, models, gate, site, after)
        self._bank = bank

    def load_gates(self, folder: str | Path, *, allow_changed: bool = False) -> None:
        """Take trained gates, with their sites, from a folder of PART.safetensors files.

        Args:
            folder: As training leaves it; a part without a file keeps its gates.
            allow_changed: As for `mole_vl.mix_from`.

        Raises:
            FileNotFoundError: No gate file there.
            ValueError: Gates that do not fit the experts; the pipeline is left as it was.
            RuntimeError: No experts are loaded.
        """
        bank, models = self._loaded("load_gates"), self._models()
        scheduler: Any = self.scheduler  # pyright: ignore[reportAttributeAccessIssue]
        steps: int = scheduler.config.num_train_timesteps
        gate_parts(bank, models, Path(folder), steps, allow_changed)

    def unload_experts(self) -> None:
        """Give the base back, bit for bit.

        Raises:
            RuntimeError: No experts are loaded.
        """
        if not self.mixtures:
            raise RuntimeError("unload_experts: no experts are loaded")
        for mixture in self.mixtures.values():
            mixture.unmix()
        self._bank = None

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Diffusers' own for the base; experts and gates, which are small, stay on the device."""
        mixtures = {mixture: mixture.unmix() for mixture in self.mixtures.values()}
        parent: Any = super()
        try:
            parent.enable_sequential_cpu_offload(*args, **kwargs)
        finally:
            for mixture, model in mixtures.items():
                mixture.wire(model)
        for mixture in mixtures:
            _settle(mixture, torch.device(self._execution_device))  # pyright: ignore

    def _models(self) -> Mapping[str, nn.Module]:
        found = {part: getattr(self, part, None) for part in PARTS}
        return {part: model for part, model in found.items() if isinstance(model, nn.Module)}

    def _loaded(self, method: str) -> Bank:
        if self._bank is None or not self.mixtures:
            by_hand = "; those mixed in by hand have no files" if self.mixtures else ""
            raise RuntimeError(f"{method}: call load_experts() first{by_hand}")
        return self._bank


def _settle(mixture: Mixture, device: torch.device) -> None:
    """Put gates and factors on a device, and leave the base layers where they are."""
    mixture.gates.to(device)
    for layer in mixture.layers.values():
        for name, factor in layer.named_buffers(recurse=False):
            setattr(layer, name, factor.to(device))
