"""The commands of `mole transform`: what is computed from a library's experts, and kept in it."""

from collections.abc import Mapping
from typing import Any

from mole_vl.library import ExpertLibrary
from mole_vl.library.transforms import (
    Merge,
    library_embedding,
    library_merge,
    library_prototypes,
    members,
)
from nlp import library_transforms as with_rows
from nlp.library_scores import ScoresConfig, scores
from nlp.task_sources import listed


def prototypes(library: str, experts: str = "") -> None:
    """Arrow's prototypes of experts, kept in the library; the route `arrow` reads them.

    Args:
        library: Address of the library.
        experts: Names with commas between; all but merges if not given.
    """
    opened = ExpertLibrary.open(library)
    names = [info.name for info in members(opened, listed(experts))]
    library_prototypes(opened, names)
    print(f"prototypes of {', '.join(names)} are in {opened.address}")


def embedding(library: str, experts: str = "", dimensions: int = 64) -> None:
    """Experts as points, by the singular value decomposition of their updates; kept.

    Args:
        library: Address of the library.
        experts: Names with commas between; all but merges if not given.
        dimensions: The most coordinates that are kept.
    """
    opened = ExpertLibrary.open(library)
    names = [info.name for info in members(opened, listed(experts))]
    found = library_embedding(opened, names, dimensions)
    print(
        f"{found.vectors.shape[1]} coordinates of {', '.join(names)}, which hold {found.held:.1%} "
        f"of their updates, are in {opened.address}"
    )


def merge(
    library: str,
    to: str,
    experts: str = "",
    weights: Mapping[str, float] | None = None,
    rank: int | None = None,
) -> None:
    """The mean of experts' updates, or their sum with weights, as an expert of the library.

    Args:
        library: Address of the library.
        to: The new expert's name.
        experts: Names with commas between; all but merges if not given.
        weights: What each expert counts, by name; 1/E each if not given.
        rank: The most that a layer may have; as much as it takes to miss nothing if not given.
    """
    how: Merge = "uniform" if weights is None else "weighted"
    _merge(library, to, how, experts, weights=weights, rank=rank)


def ties(
    library: str,
    to: str,
    experts: str = "",
    density: float = 0.2,
    weights: Mapping[str, float] | None = None,
    rank: int | None = None,
) -> None:
    """TIES of experts' updates (trim, elect signs, merge), as an expert of the library.

    Args:
        library: Address of the library.
        to: The new expert's name.
        experts: Names with commas between; all but merges if not given.
        density: Share of each update's entries that is kept, the largest.
        weights: What each expert counts in the mean, by name; 1 each if not given.
        rank: The most that a layer may have; its full rank if not given.
    """
    _merge(library, to, "ties", experts, density=density, weights=weights, rank=rank)


def dare(
    library: str,
    to: str,
    experts: str = "",
    density: float = 0.2,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    rank: int | None = None,
) -> None:
    """DARE of experts' updates (drop at random, rescale, add), as an expert of the library.

    Args:
        library: Address of the library.
        to: The new expert's name.
        experts: Names with commas between; all but merges if not given.
        density: Probability that an entry is kept.
        weights: What each expert counts, by name; 1/E each if not given.
        seed: Of what is dropped.
        rank: The most that a layer may have; its full rank if not given.
    """
    _merge(library, to, "dare", experts, density=density, weights=weights, seed=seed, rank=rank)


def _merge(library: str, to: str, how: Merge, experts: str, **settings: Any) -> None:
    opened = ExpertLibrary.open(library)
    merged = library_merge(opened, to, how, listed(experts), **settings)
    ranks = {factors.rank for factors in merged.expert.layers.values()}
    print(
        f"{to}, of rank {max(ranks)} at most, misses {merged.total:.1%} of the merge; it is in "
        f"{opened.address}"
    )


COMMANDS = {
    "_help": "Compute something from a library's experts, and keep it in the library.",
    "prototypes": prototypes, "embedding": embedding, "merge": merge, "ties": ties, "dare": dare,
    "centroids": with_rows.CentroidsConfig, "norms": with_rows.NormsConfig,
    "phatgoose": with_rows.PhatgooseLibraryConfig, "classifier": with_rows.ClassifierConfig,
    "scores": ScoresConfig,
}  # fmt: skip

RUNS = {
    with_rows.CentroidsConfig: with_rows.centroids,
    with_rows.NormsConfig: with_rows.norms,
    with_rows.PhatgooseLibraryConfig: with_rows.phatgoose,
    with_rows.ClassifierConfig: with_rows.classifier,
    ScoresConfig: scores,
}
"""What runs a command whose settings are a class."""
