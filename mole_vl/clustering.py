"""Model-based clustering of experts (MBC, arXiv 2405.11157): `pip install -e '.[library]'`."""

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mole_vl.clusters import Clusters
from mole_vl.experts import Expert, check_names
from mole_vl.faults import between, one_of, refuse, whole_at_least
from mole_vl.flattened import flattened_similarity
from mole_vl.similarity import similarity
from mole_vl.updates import on_common_layers

Over = Literal["all", "common"]


def cluster(
    experts: Sequence[Expert],
    k: int = 10,
    *,
    over: Over = "all",
    seed: int = 42,
    n_init: int = 1000,
) -> Clusters:
    """K-means on the rows of the cosine matrix of Delta-W.

    Two experts are close when they are alike to the same others. As in the paper, but for what is
    compared: the updates themselves, of any ranks and layers, not their factors.

    Args:
        experts: At least as many as clusters; ranks, alphas and layers may differ.
        k: How many clusters.
        over: The layers that are compared: all, where one that an expert leaves alone is zero; or
            those that all experts change, so that which layers an expert was trained on, which
            keeps experts apart too, does not count.
        seed: Of the search's starts.
        n_init: How many starts; the best end is taken. Experts of different tasks are nearly
            orthogonal, so that many ends are nearly as good: with the paper's 10 the seed decides
            which is found (docs/modular.md).

    Raises:
        ValueError: More clusters than experts that differ; experts that share a name, a DoRA, a
            layer that two know in different shapes, an update that is zero; no layer in common,
            where those are asked for.
    """
    _check(experts, k, seed, n_init)
    refuse("cluster", [one_of("over", over, get_args(Over))])
    measure = "Delta-W" if over == "all" else "Delta-W on common layers"
    compared = experts if over == "all" else on_common_layers(experts)
    return grouped(experts, similarity(compared), measure, k, seed=seed, n_init=n_init)


def cluster_flattened(
    experts: Sequence[Expert],
    k: int = 10,
    *,
    seed: int = 42,
    n_init: int = 10,
    sparsity: float = 0.8,
    components: int = 64,
) -> Clusters:
    """The paper's own form: as `cluster`, of sparse, flattened factors (`mole_vl.flattened`).

    A rotation in rank space, which leaves an expert's update alone, changes what is found.

    Args:
        experts: As for `cluster`, of the same layers, ranks and shapes.
        k: As for `cluster`.
        seed: As for `cluster`, and of the decomposition.
        n_init: As for `cluster`.
        sparsity: Share of each expert's entries that is set to zero, the smallest.
        components: The most that the decomposition keeps.

    Raises:
        ValueError: As for `cluster`; also factors whose layers or shapes differ.
    """
    _check(experts, k, seed, n_init)
    found = flattened_similarity(experts, sparsity=sparsity, components=components, seed=seed)
    return grouped(experts, found, "flattened factors", k, seed=seed, n_init=n_init)


def grouped(
    experts: Sequence[Expert], cosines: Tensor, measure: str, k: int, *, seed: int, n_init: int
) -> Clusters:
    """K-means (Lloyd, 1982) on the rows of a matrix of cosines (E, E).

    Raises:
        ValueError: More clusters than rows that differ.
    """
    means = KMeans(n_clusters=k, n_init=n_init, random_state=seed)  # pyright: ignore
    with warnings.catch_warnings():
        # That fewer rows differ than there are to be clusters is told below, as an error.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = np.asarray(means.fit_predict(cosines.numpy())).tolist()
    names = [expert.name for expert in experts]
    groups: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        groups.setdefault(label, []).append(name)
    if len(groups) < k:
        raise ValueError(
            f"cluster: k is {k}, and only {len(groups)} of the {len(names)} experts differ"
        )
    return Clusters(
        names=tuple(names),
        groups=tuple(map(tuple, groups.values())),
        similarity=cosines,
        measure=measure,
        seed=seed,
        n_init=n_init,
    )


def _check(experts: Sequence[Expert], k: int, seed: int, n_init: int) -> None:
    check_names(experts)
    refuse(
        "cluster",
        [
            "there is one expert, expected two or more" if len(experts) == 1 else None,
            whole_at_least("k", k, 1),
            f"k is {k}, and there are {len(experts)} experts"
            if isinstance(k, int) and k > len(experts) > 1
            else None,
            whole_at_least("n_init", n_init, 1),
            # What numpy's RandomState takes.
            between("seed", seed, 0, 2**32 - 1),
        ],
    )
