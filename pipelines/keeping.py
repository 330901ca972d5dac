"""A mixed pipeline on disk: whole, or as one ordinary LoRA."""

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from dreambooth.lora_files import Form, write_lora
from mole_vl import Mixture, merged
from mole_vl.arms import together
from pipelines.bearing import BearsExperts
from pipelines.folder import (
    check_place,
    drop_mixture,
    has_mixture,
    load_mixture,
    name_base,
    save_mixture,
)
from pipelines.recipe import Recipe, as_data, gates_digest
from pipelines.recording import Recording
from pipelines.weights import check_known


class Kept(BearsExperts):
    """A pipeline that is saved and loaded with its experts and gates."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write base, experts and gates into one folder that `from_pretrained` reads.

        The base is written as it is without experts: diffusers' own class reads it there.

        Raises:
            ValueError: `push_to_hub`, which would leave the experts out; other files where the
                mixture goes.
            RuntimeError: The experts were mixed in by hand, or are baked into the base.
        """
        parent: Any = super()
        mixtures = dict(self.mixtures)
        bank = self._loaded("save_pretrained") if mixtures else {}
        check_place(Path(save_directory))
        if mixtures and kwargs.get("push_to_hub"):
            raise ValueError(
                "save_pretrained: push_to_hub would leave the experts out; save, then upload the "
                "folder"
            )
        # Nobody draws meanwhile; a baked mixture refuses the context.
        with together([mixture.scaled(1.0) for mixture in mixtures.values()]):
            models = {mixture: mixture.unmix() for mixture in mixtures.values()}
            try:
                parent.save_pretrained(save_directory, *args, **kwargs)
            finally:
                for mixture, model in models.items():
                    mixture.wire(model)
        drop_mixture(Path(save_directory))
        name_base(Path(save_directory), type(self))
        if mixtures:
            save_mixture(Path(save_directory), bank, mixtures)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """The base as diffusers reads it, with the experts and gates that were saved with it.

        All parts are in fp32 unless `dtype` says otherwise.
        """
        parent: Any = super()
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            # Left alone, transformers takes what its models were saved in, and diffusers fp32.
            kwargs["dtype"] = torch.float32
        pipe: Self = parent.from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        folder = Path(pretrained_model_name_or_path)
        if has_mixture(folder):
            load_mixture(folder, pipe.load_experts, pipe.load_gates)
        return pipe

    def export(
        self,
        path: str | Path,
        rank: int | None = None,
        form: Form = "peft",
        *,
        weights: Mapping[str, float] | Recording | None = None,
    ) -> dict[str, float]:
        """Write the mixture as one ordinary LoRA, for tools that know nothing of gates.

        Args:
            path: Its name is the LoRA's. peft: a folder, which gets one for each component;
                diffusers: a .safetensors file or a folder; kohya: a .safetensors file.
            rank: The most that a layer may have; as much as its experts have together if not given.
            form: The format; plain diffusers loads all but peft's by `load_lora_weights`.
            weights: Constant weights by expert's name (zero for the others), or what `record()`
                listed, for its means; None for gates that are constant.

        Returns:
            What each component's LoRA misses: Frobenius norm over that of the whole update.

        Raises:
            ValueError: A rank below 1, an unknown expert, or no weights for gates that vary.
            RuntimeError: No experts are loaded.
        """
        if not self.mixtures:
            raise RuntimeError("export: call load_experts() first")
        given = {part: self._constant(part, m, weights) for part, m in self.mixtures.items()}
        name, base = Path(path).resolve().stem, getattr(self, "name_or_path", None)
        found = {
            part: merged(mixture, name, given[part], rank)
            for part, mixture in self.mixtures.items()
            if _speak(given[part])
        }
        if not found:
            raise ValueError("export: with these weights nothing changes the base")
        write_lora({part: replace(m.expert, base=base) for part, m in found.items()}, path, form)
        return {part: m.total for part, m in found.items()}

    def recipe(self, prompt: str, *, seed: int, **call: Any) -> Recipe:
        """How the pipeline as it stands draws a picture, for `save_picture`.

        Args:
            prompt: What is asked for.
            seed: Of the call's generator.
            call: The call's other arguments, without the generator.

        Raises:
            ValueError: An argument that a file cannot hold, such as a function.
        """
        # What is not given is the pipeline's own default.
        defaults = signature(super().__call__).parameters  # pyright: ignore
        steps, guidance_scale = (
            call.pop(name, defaults[name].default)
            for name in ("num_inference_steps", "guidance_scale")
        )
        kind: Any = type(self)
        return Recipe(
            pipeline=kind.__name__,
            base=getattr(self, "name_or_path", None),
            experts={
                part: dict(zip(m.names, m.digests, strict=True))
                for part, m in self.mixtures.items()
            },
            gates={part: gates_digest(m) for part, m in self.mixtures.items()},
            scheduler=type(self.scheduler).__name__,  # pyright: ignore
            prompt=prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            settings={name: as_data(name, value) for name, value in call.items()},
        )

    def _constant(
        self, part: str, mixture: Mixture, weights: Mapping[str, float] | Recording | None
    ) -> Mapping[str, float] | Mapping[str, Tensor] | None:
        if isinstance(weights, Recording):
            weights.check_experts(part, mixture.names)
            return weights.mean(part)
        if weights is not None:
            check_known(self.experts, weights, "weights")
            return {name: weights.get(name, 0.0) for name in mixture.names}
        if mixture.reads:
            raise ValueError(
                f"export: the gates of {part} read {mixture.reads}, so their weights vary; give "
                "`weights`, by expert's name or from record()"
            )
        return None


def _speak(weights: Mapping[str, Any] | None) -> bool:
    """Whether a part has anything to say: its experts may all be at zero, unlike another part's."""
    return weights is None or any(bool(torch.as_tensor(w).any()) for w in weights.values())
