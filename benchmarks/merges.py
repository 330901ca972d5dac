"""Merges of LoRAs by peft, each as it comes out of `add_weighted_adapter`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from diffusers import UNet2DConditionModel
from peft import PeftModel

KINDS = ("cat", "svd", "ties_svd", "dare_ties_svd")
Kind = Literal["cat", "svd", "ties_svd", "dare_ties_svd"]
# Share of a LoRA's update that TIES and DARE keep: of TIES' paper (arXiv 2306.01708), also mttl's.
DENSITY = 0.2


class PeftMerges:
    """A UNet under peft, with LoRAs loaded and merged on demand.

    Args:
        unet: It is changed in place.
        folders: PEFT folders; an adapter's name is its folder's parent's.
    """

    def __init__(self, unet: UNet2DConditionModel, folders: Sequence[Path]) -> None:
        self.names = [folder.parent.name for folder in folders]
        self.model = PeftModel.from_pretrained(unet, folders[0], adapter_name=self.names[0])  # pyright: ignore[reportArgumentType] (any module)
        for name, folder in zip(self.names[1:], folders[1:], strict=True):
            self.model.load_adapter(folder, adapter_name=name)

    @contextmanager
    def merged(self, kind: Kind, strength: float) -> Iterator[None]:
        """A context in which the LoRAs' merge is active, each LoRA weighed by `strength`."""
        settings = {} if kind in ("cat", "svd") else {"density": DENSITY}
        weights = [strength] * len(self.names)
        self.model.add_weighted_adapter(self.names, weights, "merged", kind, **settings)  # pyright: ignore[reportCallIssue]
        self.model.set_adapter("merged")
        try:
            yield
        finally:
            self.model.set_adapter(self.names[0])
            self.model.delete_adapter("merged")
