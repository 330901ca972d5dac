"""Cosines of flattened factors, as the paper's clustering has them (arXiv 2405.11157).

They depend on how an update is written: (R A, B R^-1) is the same update as (A, B), and may be
orthogonal to it here. `mole_vl.similarity` compares the updates.
"""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from torch import Tensor

from mole_vl.experts import Expert, check_names
from mole_vl.faults import refuse, share, told, whole_at_least
from mole_vl.similarity import cosines


def flattened_similarity(
    experts: Sequence[Expert], *, sparsity: float = 0.8, components: int = 64, seed: int = 42
) -> Tensor:
    """Cosines of the experts' embeddings by `flattened_embedding`, (E, E) in fp64.

    Arguments and errors are those of `flattened_embedding`.
    """
    found = flattened_embedding(experts, sparsity=sparsity, components=components, seed=seed)
    return cosines(found @ found.T, [expert.name for expert in experts])


def flattened_embedding(
    experts: Sequence[Expert], *, sparsity: float = 0.8, components: int = 64, seed: int = 42
) -> Tensor:
    """All of an expert's A and B as one row, sparse, through a truncated SVD; rows of length 1.

    Scales are left out, as in the paper.

    Args:
        experts: At least two, of the same layers, ranks and shapes.
        sparsity: Entries of a row up to this quantile of their magnitudes are set to zero.
        components: The most that the SVD keeps; it has no more than there are experts.
        seed: Of the SVD's start.

    Returns:
        (E, components) in fp64.

    Raises:
        ValueError: Fewer than two experts, or experts that share a name; factors whose layers or
            shapes differ, or DoRAs; settings out of range; a row that is zero.
    """
    check_names(experts)
    refuse(
        "flattened",
        [
            "there is one expert, expected two or more" if len(experts) == 1 else None,
            share("sparsity", sparsity),
            whole_at_least("components", components, 1),
            *told(_differences(experts), 3),
        ],
    )
    rows = np.stack([_sparse(_flat(expert), sparsity) for expert in experts])
    empty = [one.name for one, row in zip(experts, rows, strict=True) if not row.any()]
    if empty:
        raise ValueError(f"flattened: the factors of {', '.join(empty)} are all zero")
    kept = min(components, *rows.shape)
    svd = TruncatedSVD(kept, algorithm="randomized", n_iter=5, random_state=seed)
    # Experts that are all alike have no variance, by which it divides for a figure not used here.
    with np.errstate(invalid="ignore"):
        found = np.asarray(svd.fit_transform(rows))
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"flattened: {kept} components hold nothing of one of the experts")
    return torch.from_numpy(found / norms)


def _flat(expert: Expert) -> np.ndarray:
    parts = [f.flatten() for _, own in sorted(expert.layers.items()) for f in (own.a, own.b)]
    return torch.cat([part.detach().double().cpu() for part in parts]).numpy()


def _sparse(row: np.ndarray, sparsity: float) -> np.ndarray:
    size = np.abs(row)
    return np.where(size > np.quantile(size, sparsity), row, 0.0) if sparsity else row


def _differences(experts: Sequence[Expert]) -> list[str]:
    """Where factors are of other shapes than the first expert's, each by expert and layer."""
    first, *others = experts
    faults = [
        f"expert {one.name!r} is a DoRA at {path}"
        for one in experts
        for path, own in one.layers.items()
        if own.magnitude is not None
    ]
    for one in others:
        paths = sorted(first.layers.keys() | one.layers.keys())
        odd = [path for path in paths if _shapes(one, path) != _shapes(first, path)]
        if odd:
            faults.append(
                f"at {len(odd)} layers, {odd[0]} first, {one.name!r} has {_shapes(one, odd[0])} "
                f"and {first.name!r} {_shapes(first, odd[0])}"
            )
    return faults


def _shapes(expert: Expert, path: str) -> str:
    own = expert.layers.get(path)
    return "nothing" if own is None else f"a {tuple(own.a.shape)}, b {tuple(own.b.shape)}"
