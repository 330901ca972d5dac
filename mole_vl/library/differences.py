"""What two libraries, or two versions of an expert, differ in."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mole_vl.faults import differences
from mole_vl.library.info import ExpertInfo
from mole_vl.library.library import ExpertLibrary
from mole_vl.library.weights import StoredExpert
from mole_vl.similarity import gram

# What tells a writing of an expert, and not the expert, apart.
_OWN = ("name", "version", "digest", "created", "files")


@dataclass(frozen=True, kw_only=True)
class Changed:
    """How an expert became another.

    Args:
        said: What is said of it otherwise: `task was None, is 'past'`.
        sizes: The Frobenius norms of Delta-W before and now; None where they are not known.
        cosine: The cosine of the two; None where one is zero or not known.
        distance: The norm of their difference over the norm before; as `cosine`.
        why: Why nothing is known of Delta-W, where that is so.
    """

    said: tuple[str, ...] = ()
    sizes: tuple[float, float] | None = None
    cosine: float | None = None
    distance: float | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What a library became.

    Args:
        removed: Names that it had and has not.
        added: Names that it has and had not.
        renamed: Names of one and the same version that are others now, by the old ones.
        changed: How experts that are others under their names differ, by name.
        same: Names that stand for the same version.
        damaged: What is wrong with experts that could not be compared, by name.
    """

    removed: tuple[str, ...]
    added: tuple[str, ...]
    renamed: Mapping[str, str]
    changed: Mapping[str, Changed]
    same: tuple[str, ...]
    damaged: Mapping[str, str]


def library_difference(before: ExpertLibrary, now: ExpertLibrary) -> Difference:
    """What differs between two libraries.

    Experts are compared by the hash of all their files; weights are read of those alone that
    differ.

    Raises:
        DamagedExpertError: The weights of an expert that has to be compared are damaged.
    """
    old, new = before.list(), now.list()
    damaged = {**old.damaged, **new.damaged}
    one = {name: info for name, info in old.experts.items() if name not in damaged}
    other = {name: info for name, info in new.experts.items() if name not in damaged}
    gone, come = [n for n in one if n not in other], [n for n in other if n not in one]
    by_version = {other[name].version: name for name in come}
    renamed = {n: by_version[one[n].version] for n in gone if one[n].version in by_version}
    both = [name for name in one if name in other]
    changed = [name for name in both if one[name].version != other[name].version]
    return Difference(
        removed=tuple(name for name in gone if name not in renamed),
        added=tuple(name for name in come if name not in renamed.values()),
        renamed=renamed,
        changed={name: expert_difference(before[name], now[name]) for name in changed},
        same=tuple(name for name in both if name not in changed),
        damaged=damaged,
    )


def expert_difference(before: StoredExpert, now: StoredExpert) -> Changed:
    """How one stored expert differs from another; their names do not count.

    Raises:
        DamagedExpertError: The weights of one are damaged.
    """
    said = tuple(differences(_said(before.info), _said(now.info)))
    if before.info.digest == now.info.digest:
        return Changed(said=said, cosine=1.0, distance=0.0)
    pair = [replace(before.expert, name="before"), replace(now.expert, name="now")]
    try:
        (old, cross), (_, new) = gram(pair).tolist()
    except ValueError as error:
        # A DoRA, or layers of other shapes: the two cannot be compared, and are told apart anyway.
        return Changed(said=said, why=str(error))
    product = (max(old, 0.0) * max(new, 0.0)) ** 0.5
    apart = max(old + new - 2 * cross, 0.0) ** 0.5
    return Changed(
        said=said,
        sizes=(max(old, 0.0) ** 0.5, max(new, 0.0) ** 0.5),
        cosine=max(-1.0, min(1.0, cross / product)) if product else None,
        distance=apart / old**0.5 if old > 0 else None,
    )


def _said(info: ExpertInfo) -> dict[str, Any]:
    return {key: value for key, value in asdict(info).items() if key not in _OWN}
