"""What is computed from a library's experts, and kept in it.

Data of an expert are kept under its version (`ExpertLibrary.auxiliary`): they are computed once,
and never serve an expert that was replaced. A merge becomes an expert of the library.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from mole_vl.arithmetic import weighted_sum
from mole_vl.compression import Merged, compressed
from mole_vl.embedding import Embedding, svd_embedding
from mole_vl.experts import Expert
from mole_vl.faults import refuse
from mole_vl.library.errors import NameTakenError
from mole_vl.library.info import ExpertInfo
from mole_vl.library.library import ExpertLibrary
from mole_vl.library.names import check_word
from mole_vl.prototypes import prototypes_of
from mole_vl.sparsified import dare, ties

T = TypeVar("T")

PROTOTYPES, EMBEDDING = "prototypes", "embedding"
Merge = Literal["uniform", "weighted", "ties", "dare"]
_MERGED = "merged"


def members(library: ExpertLibrary, names: Sequence[str] = ()) -> list[ExpertInfo]:
    """The experts that are meant: those that are named, or all but what was merged from others.

    Raises:
        MissingExpertError: There is no expert of a name.
        ValueError: There are none, or a name stands twice.
        DamagedExpertError: One of them is damaged.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    refuse("experts", [f"{', '.join(twice)} is named twice" if twice else None])
    listing = library.list()
    # `get` raises what is wrong with a name.
    asked = names or sorted(
        {name for name, info in listing.experts.items() if _MERGED not in info.training}
        | listing.damaged.keys()
    )
    found = [listing.experts.get(name) or library.get(name).info for name in asked]
    damaged = [listing.damaged[name] for name in asked if name in listing.damaged]
    if damaged:
        raise ValueError(f"{damaged[0]}; or name the other experts")
    refuse(library.address, [None if found else "there are no experts yet"])
    return found


def common_base(experts: Sequence[ExpertInfo]) -> str | None:
    """The base model's name that experts agree on; None where none of them tells one.

    Raises:
        ValueError: They are for several bases.
    """
    bases = sorted({info.base for info in experts if info.base is not None})
    if len(bases) > 1:
        first = {base: next(i.name for i in experts if i.base == base) for base in bases}
        told = ", ".join(f"{name} for {base}" for base, name in first.items())
        raise ValueError(f"the experts are for several bases ({told}): name those of one")
    return bases[0] if bases else None


def kept(
    library: ExpertLibrary,
    kind: str,
    names: Sequence[str],
    make: Callable[[Sequence[str]], Mapping[str, T]],
    *,
    store: bool = True,
    anew: bool = False,
) -> dict[str, T]:
    """Data of a kind for experts: what the library has, and what is made of the others now.

    Args:
        library: The library.
        kind: Of the data.
        names: The experts.
        make: Makes the data of experts that have none.
        store: Whether what was made is kept in the library.
        anew: Whether data of all the experts are made, and what the library has does not count.

    Raises:
        ValueError: An expert was replaced while its data were made.
    """
    found: dict[str, Any] = {} if anew else library.auxiliary.each(kind, names)
    missing = [name for name in names if name not in found]
    if missing:
        versions = _versions(library, missing)
        made = make(missing)
        if store:
            keep(library, kind, made, versions)
        found |= made
    return {name: found[name] for name in names}


def keep(
    library: ExpertLibrary, kind: str, made: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Store data that were computed from experts, unless these are others by now.

    Args:
        library: The library.
        kind: Of the data.
        made: The data, by the experts' names.
        versions: The experts' versions as the computation began, by name.

    Raises:
        ValueError: Some experts were replaced meanwhile; the data of the others are stored.
    """
    _put(library, kind, made, versions, lambda same: library.auxiliary.put(kind, same))


def keep_scores(
    library: ExpertLibrary,
    task: str,
    made: Mapping[str, float],
    versions: Mapping[str, str],
    measure: str,
) -> None:
    """Note experts' scores for a task, unless these are others by now.

    Args:
        library: The library.
        task: The task.
        made: The scores, by the experts' names.
        versions: The experts' versions as the measurement began, by name.
        measure: What was measured.

    Raises:
        ValueError: Some experts were replaced meanwhile; the scores of the others are noted.
    """
    _put(library, "scores", made, versions, lambda same: library.scores.put(task, same, measure))


def _put(
    library: ExpertLibrary,
    what: str,
    made: Mapping[str, T],
    versions: Mapping[str, str],
    put: Callable[[dict[str, T]], None],
) -> None:
    now = _versions(library, made)
    lost = [name for name in made if now.get(name) != versions[name]]
    put({name: value for name, value in made.items() if name not in lost})
    if lost:
        raise ValueError(
            f"{library.address}: {', '.join(lost)} was replaced or removed while its {what} were "
            "computed, and they were not kept: compute them anew"
        )


def _versions(library: ExpertLibrary, names: Iterable[str]) -> dict[str, str]:
    known = library.list().experts
    return {name: known[name].version for name in names if name in known}


def library_prototypes(
    library: ExpertLibrary, names: Sequence[str], *, store: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Arrow's prototypes by layer, by expert (`mole_vl.prototypes`); kept once they were made."""

    def make(missing: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        return {name: prototypes_of(library[name].expert) for name in missing}

    return kept(library, PROTOTYPES, names, make, store=store)


def library_embedding(
    library: ExpertLibrary, names: Sequence[str], dimensions: int | None = 64
) -> Embedding:
    """Experts as points by the SVD of their Delta-W; each one's coordinates are kept.

    Coordinates hang on all the experts that were embedded together: their names and hashes are kept
    with each.
    """
    stored = [library[name] for name in names]
    found = svd_embedding([one.expert for one in stored], dimensions)
    among = {one.info.name: one.info.digest for one in stored}
    vectors = zip(found.names, found.vectors.tolist(), strict=True)
    keep(
        library,
        EMBEDDING,
        {name: {"vector": vector, "among": among} for name, vector in vectors},
        {one.info.name: one.info.version for one in stored},
    )
    return found


def library_merge(
    library: ExpertLibrary,
    name: str,
    how: Merge,
    names: Sequence[str],
    *,
    weights: Mapping[str, float] | None = None,
    density: float = 0.2,
    seed: int = 0,
    rank: int | None = None,
) -> Merged:
    """Merge experts into one, and add it to the library under a name.

    Args:
        library: The library.
        name: The new expert's.
        how: The mean (uniform); the sum with weights; TIES; DARE.
        names: The experts.
        weights: What each update counts, by name; for all but the mean.
        density: As of `mole_vl.sparsified.ties` and `dare`.
        seed: As of `mole_vl.sparsified.dare`.
        rank: The most that a layer of the result may have; as much as it takes if not given.

    Raises:
        NameTakenError: There is an expert of this name.
        ValueError: As of the merges; weights of other experts; experts for several bases; a name
            that would not do as a part of an address.
    """
    check_word("name", name)
    if name in library:
        raise NameTakenError(
            f"{library.address} has an expert {name!r} already: choose another name"
        )
    infos = members(library, names)
    names = [info.name for info in infos]
    refuse("merge", _faults(how, names, weights))
    experts = [library[one].expert for one in names]
    given = None if weights is None else [weights[one] for one in names]
    merged = _merged(name, how, experts, given, density, seed, rank)
    said = {"density": density} if how in ("ties", "dare") else {}
    said |= {"seed": seed} if how == "dare" else {}
    library.add(
        replace(merged.expert, base=common_base(infos)),
        training={
            _MERGED: how,
            "of": {info.name: info.digest for info in infos},
            **({"weights": dict(weights)} if weights else {}),
            **said,
            "rank": rank,
            "error": merged.total,
        },
    )
    return merged


def _merged(
    name: str,
    how: Merge,
    experts: Sequence[Expert],
    weights: Sequence[float] | None,
    density: float,
    seed: int,
    rank: int | None,
) -> Merged:
    if how == "ties":
        return ties(name, experts, density=density, weights=weights, rank=rank)
    if how == "dare":
        return dare(name, experts, density=density, weights=weights, seed=seed, rank=rank)
    mean = [1 / len(experts)] * len(experts)
    return compressed(weighted_sum(name, experts, mean if weights is None else weights), rank)


def _faults(
    how: Merge, names: Sequence[str], weights: Mapping[str, float] | None
) -> list[str | None]:
    given = weights or {}
    lacking = [name for name in names if name not in given] if weights is not None else []
    strange = [name for name in given if name not in names]
    return [
        "weighted asks for weights, one for each expert"
        if how == "weighted" and weights is None
        else None,
        "uniform takes no weights: take weighted" if how == "uniform" and weights else None,
        f"weights lack {', '.join(lacking)}" if lacking else None,
        f"weights name {', '.join(strange)}, which is none of {', '.join(names)}"
        if strange
        else None,
    ]
