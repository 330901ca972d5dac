"""Merges of LoRAs by peft, each as it comes out of `add_weighted_adapter`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

KINDS = ("cat", "svd", "ties_svd", "dare_ties_svd")
Kind = Literal["cat", "svd", "ties_svd", "dare_ties_svd"]
# Share of a LoRA's update that TIES and DARE keep: of TIES' paper (arXiv 2306.01708), also mttl's.
DENSITY = 0.2


class PeftMerges:
    """A model under peft, with LoRAs loaded and merged on demand.

    Args:
        model: It is changed in place; `model.unload()` of the merges gives it back.
        folders: PEFT folders by adapter.
    """

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        self.names = list(folders)
        first, *others = self.names
        self.model = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
        for name in others:
            self.model.load_adapter(folders[name], adapter_name=name)

    @contextmanager
    def merged(self, kind: Kind, strength: float, density: float = DENSITY) -> Iterator[None]:
        """A context in which the LoRAs' merge is active.

        Args:
            kind: The merge.
            strength: What each LoRA is weighed by.
            density: Share of a LoRA's update that TIES and DARE keep; the others keep all.
        """
        weights = [strength] * len(self.names)
        torch.manual_seed(0)  # DARE drops at random.
        # Of an SVD in full, all beyond the rank would be thrown away.
        self.model.add_weighted_adapter(  # pyright: ignore[reportCallIssue]
            self.names, weights, "merged", kind, density=density, svd_full_matrices=False
        )
        self.model.set_adapter("merged")
        try:
            yield
        finally:
            self.model.set_adapter(self.names[0])
            self.model.delete_adapter("merged")
