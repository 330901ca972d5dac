"""Clusters of experts: which belong together, and by what (MBC, arXiv 2405.11157)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_vl.arithmetic import weighted_sum
from mole_vl.experts import Expert, check_names
from mole_vl.faults import refuse, told, whole_at_least
from mole_vl.files import new_file, read_object

FORMAT = "mole-vl clusters 1"


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Which experts belong together.

    Args:
        names: The experts in order.
        groups: The experts' names by cluster. Every expert is in one; clusters, and the experts in
            each, stand in the order of `names`.
        similarity: What was clustered, the cosines of all pairs, (E, E) in fp64.
        measure: What the cosines are of, in a word or two.
        seed: Of the search.
        n_init: How often the search began anew.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    similarity: Tensor
    measure: str
    seed: int
    n_init: int

    def __post_init__(self) -> None:
        count = len(self.names)
        members = [name for group in self.groups for name in group]
        refuse(
            "Clusters",
            [
                None
                if sorted(members) == sorted(set(self.names)) and len(set(self.names)) == count
                else f"the groups hold {', '.join(members)}; expected each of "
                f"{', '.join(self.names)} once",
                None if all(self.groups) else "one of the groups is empty",
                None
                if self.similarity.shape == (count, count)
                and bool(self.similarity.isfinite().all())
                else f"similarity is of shape {tuple(self.similarity.shape)}, expected finite "
                f"numbers of shape ({count}, {count})",
                whole_at_least("seed", self.seed, 0),
                whole_at_least("n_init", self.n_init, 1),
            ],
        )

    @property
    def order(self) -> tuple[int, ...]:
        """Places of the experts, one cluster after the other: the picture's rows."""
        return tuple(self.names.index(name) for group in self.groups for name in group)

    def to_data(self) -> dict[str, Any]:
        """The clusters as JSON data."""
        return {
            "format": FORMAT,
            "clusters": [list(group) for group in self.groups],
            "experts": list(self.names),
            "similarity": self.similarity.tolist(),
            "measure": self.measure,
            "seed": self.seed,
            "n_init": self.n_init,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Clusters":
        """The clusters that `to_data` wrote.

        Raises:
            ValueError: Another format, or entries that are missing, unknown, or of another kind.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"clusters: format is {data.get('format')!r}, expected {FORMAT!r}")
        refuse("clusters", told(_faults(data)))
        return cls(
            names=tuple(data["experts"]),
            groups=tuple(map(tuple, data["clusters"])),
            similarity=torch.tensor(data["similarity"], dtype=torch.float64),
            measure=data["measure"],
            seed=data["seed"],
            n_init=data["n_init"],
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file, in one rename."""
        with new_file(Path(path)) as partial:
            partial.write_text(
                json.dumps(self.to_data(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    @classmethod
    def load(cls, path: str | Path) -> "Clusters":
        """The clusters in a JSON file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no clusters.
        """
        found = read_object(Path(path))
        try:
            return cls.from_data(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def cluster_averages(clusters: Clusters, experts: Sequence[Expert]) -> list[Expert]:
    """One expert for each cluster, the average of its members' Delta-W.

    It is called by its members' names, joined by `+`. The paper trains it anew on its members' rows
    (`nlp.clusters`); this needs no data.

    Args:
        clusters: The clusters.
        experts: Those that were clustered, in any order.

    Raises:
        ValueError: Experts that are not those that were clustered.
    """
    check_names(experts)
    by_name = {expert.name: expert for expert in experts}
    odd = sorted(by_name.keys() ^ set(clusters.names))
    if odd:
        raise ValueError(
            f"cluster_averages: {', '.join(odd)} are not both among the experts and in the clusters"
        )
    return [
        weighted_sum(
            "+".join(group), [by_name[name] for name in group], [1 / len(group)] * len(group)
        )
        for group in clusters.groups
    ]


_KINDS = {
    "measure": (str, "some words"),
    "seed": (int, "a whole number"),
    "n_init": (int, "a whole number"),
}


def _faults(data: Mapping[str, Any]) -> list[str]:
    """What keeps JSON data from being clusters."""
    known = {"format", "clusters", "experts", "similarity", *_KINDS}
    faults = [f"{key} is missing" for key in sorted(known - data.keys())]
    faults += [f"{key} is unknown" for key in sorted(data.keys() - known)]
    faults += [
        f"{key} is {data[key]!r}, expected {words}"
        for key, (kind, words) in _KINDS.items()
        if key in data and (not isinstance(data[key], kind) or isinstance(data[key], bool))
    ]
    if "experts" in data and not _words(data["experts"]):
        faults.append(f"experts is {data['experts']!r}, expected a list of names")
    groups = data.get("clusters", [])
    if not isinstance(groups, list) or not all(map(_words, groups)):
        faults.append(f"clusters is {groups!r}, expected lists of names")
    rows = data.get("similarity", [])
    if not _square(rows):
        faults.append("similarity is no square of numbers")
    return faults


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _square(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == len(rows)
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in row)
        for row in rows
    )
