"""The one pipeline of a page: loaded once, lent to one drawing at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import PartialState
from diffusers import DiffusionPipeline

from apps.shelf import Lora
from apps.stopping import Turn
from mole_vl.gates import GateSpec
from mole_vl.sites import SiteKind
from pipelines import MoLEStableDiffusionPipeline, MoLEStableDiffusionXLPipeline

Pipe: TypeAlias = MoLEStableDiffusionPipeline | MoLEStableDiffusionXLPipeline

_KINDS = {
    "StableDiffusionPipeline": MoLEStableDiffusionPipeline,
    "StableDiffusionXLPipeline": MoLEStableDiffusionXLPipeline,
}


def load_pipeline(base: str) -> Pipe:
    """A Stable Diffusion 1.x, 2.x or XL that mixes LoRAs.

    Args:
        base: A folder, or a Hub id.

    Raises:
        FileNotFoundError: Neither a folder of diffusers' format nor the form of a Hub id.
        ValueError: A pipeline of another kind.
    """
    folder = Path(base)
    if not (folder / "model_index.json").exists() and (folder.exists() or base.count("/") != 1):
        raise FileNotFoundError(
            f"{base} has no model_index.json: expected a Stable Diffusion in diffusers' format, a "
            "folder or a Hub id"
        )
    index: Any = DiffusionPipeline.load_config(base)
    name = str(index.get("_class_name")).removeprefix("MoLE")
    if name not in _KINDS:
        raise ValueError(f"{base} is a {name}, expected one of {', '.join(_KINDS)}")
    pipe = _KINDS[name].from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(PartialState().device)


class Studio:
    """A pipeline that puts on whichever LoRAs and gates a drawing wants.

    Args:
        pipe: The pipeline, without experts.
        gate: What decides the weights where no trained gates are.
        site: As for `mole_vl.mix`.
        after: As for `mole_vl.mix`.
    """

    def __init__(self, pipe: Pipe, gate: GateSpec, site: SiteKind, after: int = 0) -> None:
        self._pipe = pipe
        self._how: dict[str, Any] = {"gate": gate, "site": site, "after": after}
        self._turn = Turn()
        self._worn: object = None
        self.base = str(pipe.name_or_path)
        self.unet_config = pipe.unet.config

    @contextmanager
    def holding(
        self,
        loras: Sequence[Lora],
        gates: Path | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[Pipe]:
        """A context in which the pipeline bears these LoRAs, and nobody else has it.

        Args:
            loras: In order; none for the base alone.
            gates: Folder of their trained gates.
            waiting: Called while another drawing has the pipeline; may raise.

        Raises:
            ValueError: LoRAs or gates that do not fit.
        """
        self._turn.take(waiting)
        try:
            self._wear(loras, gates)
            yield self._pipe
        finally:
            self._turn.give_back()

    def _wear(self, loras: Sequence[Lora], gates: Path | None) -> None:
        wanted = ([(lora.name, lora.folder) for lora in loras], gates)
        if wanted == self._worn:
            return
        self._worn = None
        if self._pipe.mixtures:
            self._pipe.unload_experts()
        if loras:
            self._pipe.load_experts({lora.name: lora.folder for lora in loras}, **self._how)
        if gates is not None:
            self._pipe.load_gates(gates)
        self._worn = wanted
