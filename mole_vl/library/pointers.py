"""Pointers: small files that say, one after the other, what a name stands for."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from mole_vl.faults import instance_of, one_of, refuse
from mole_vl.library.seals import sealed, unsealed

Act = Literal["add", "replace", "remove", "restore", "rename", "clone"]
NAMES, COMMITS = "names", "commits"
_PATH = re.compile(rf"{NAMES}/(?P<name>[^/]+)/(?P<number>\d{{6}})\.json")


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """One change of one name. The last of a name's pointers that counts is what the name is.

    Args:
        name: The name.
        number: How many pointers the name has had with this one.
        act: What was done.
        present: Whether the name stands for an expert from here on.
        folder: The folder of that expert; of a name without one, of the last it had.
        other: After a rename, the other name.
        at: When, UTC.
        commit: The change of several names that it is part of: it counts if that did come about.
        nonce: What tells two writers' pointers apart, were all else the same.
    """

    name: str
    number: int
    act: Act
    present: bool
    folder: str
    other: str | None = None
    at: str
    commit: str | None = None
    nonce: str

    @property
    def path(self) -> str:
        """Where it lies in the library."""
        return pointer_path(self.name, self.number)

    @property
    def version(self) -> str:
        """Version of the expert."""
        return self.folder.rpartition("/")[2]

    def contents(self) -> bytes:
        """What its file holds."""
        return sealed(asdict(self))


def pointer_path(name: str, number: int) -> str:
    """Where a name's pointer of this number lies."""
    return f"{NAMES}/{name}/{number:06d}.json"


def numbers(paths: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of each name's pointers, ascending, from the paths of files."""
    found: dict[str, list[int]] = {}
    for path in paths:
        if match := _PATH.fullmatch(path):
            found.setdefault(match["name"], []).append(int(match["number"]))
    return {name: sorted(found[name]) for name in sorted(found)}


def read_pointer(content: bytes, path: str) -> Pointer:
    """Read a pointer.

    Raises:
        ValueError: The file is damaged, or another pointer's.
    """
    said: dict[str, Any] = unsealed(content, path)
    if said.keys() != {entry.name for entry in fields(Pointer)}:
        raise ValueError(f"{path} is no pointer: it holds {', '.join(said) or 'nothing'}")
    refuse(
        path,
        [
            one_of("act", said["act"], get_args(Act)),
            instance_of("present", said["present"], bool),
            instance_of("folder", said["folder"], str),
        ],
    )
    pointer = Pointer(**said)
    if pointer.path != path:
        raise ValueError(f"{path} holds the pointer {pointer.path}: it was moved or copied there")
    return pointer


def commit_path(commit: str) -> str:
    """Where the fate of a change of several names is written."""
    return f"{COMMITS}/{commit}.json"


def fate_contents(commit: str, pointers: Iterable[str]) -> bytes:
    """The file that makes a change count, which lists its pointers; none of them: that ends it."""
    return sealed({"commit": commit, "pointers": list(pointers)})


def read_fate(content: bytes, path: str) -> frozenset[str]:
    """The pointers that a change made count; none if it was given up.

    Raises:
        ValueError: The file is damaged, or another change's.
    """
    said = unsealed(content, path)
    if commit_path(str(said.get("commit"))) != path:
        raise ValueError(f"{path} is not what was written there: it is of {said.get('commit')!r}")
    return frozenset(said["pointers"])
