"""The weights of a drawing, by component, site, call and expert."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_vl import mean_weights
from mole_vl.passes import Record


@dataclass(frozen=True)
class WeightMap:
    """What a heat map is drawn from.

    Args:
        sites: Names of the sites.
        experts: Names of the experts.
        weights: Mean over pictures and positions, strength included, (sites, calls, experts). A
            UNet's calls are the steps; a text encoder's are the prompts and the negative prompts.
    """

    sites: tuple[str, ...]
    experts: tuple[str, ...]
    weights: Tensor


class Recording(Mapping[str, WeightMap]):
    """Weight maps by component, of all that was drawn inside `record()`.

    Args:
        names: The experts of each component.
        records: What each component's gates said; it may still grow.
    """

    def __init__(
        self, names: Mapping[str, tuple[str, ...]], records: Mapping[str, Sequence[Record]]
    ) -> None:
        self._names = names
        self._records = records

    def __getitem__(self, component: str) -> WeightMap:
        by_site: dict[str, list[Tensor]] = {}
        for record in self._records[component]:
            by_site.setdefault(record.site, []).append(mean_weights([record])[record.site])
        calls = [torch.stack(weights).cpu() for weights in by_site.values()]
        experts = self._names[component]
        weights = torch.stack(calls) if calls else torch.zeros(0, 0, len(experts))
        return WeightMap(tuple(by_site), experts, weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def check_experts(self, component: str, experts: tuple[str, ...]) -> None:
        """Raise ValueError unless the component was recorded with these experts in this order."""
        own = self._names.get(component, ())
        if own != experts:
            raise ValueError(
                f"weights: the recording of {component} is of the experts "
                f"{', '.join(own) or 'none'}, expected {', '.join(experts)}"
            )

    def mean(self, component: str) -> dict[str, Tensor]:
        """The mean weights (E,) of each site: what an export may stand for.

        Raises:
            ValueError: The component did not run.
        """
        return mean_weights(self._records[component])
