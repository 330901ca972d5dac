"""A change thought out on one state of a library, before it is written."""

import uuid
from dataclasses import replace

from mole_vl.library.catalogue import present
from mole_vl.library.errors import DamagedExpertError, MissingExpertError, NameTakenError
from mole_vl.library.info import now
from mole_vl.library.log import Index
from mole_vl.library.pointers import Act, Pointer, commit_path, fate_contents


class UnsettledError(Exception):
    """A name is part of other changes that have no fate yet."""

    def __init__(self, commits: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(commits)))
        self.commits = commits


class Draft:
    """What every name stands for with the changes so far; each is checked as it is made.

    Args:
        index: The state that it begins with.
        address: The library's, for messages.
    """

    def __init__(self, index: Index, address: str) -> None:
        self.index = index
        self.heads = dict(index.heads)
        self._address = address
        self._last = dict(index.last)
        self._pointers: list[Pointer] = []

    def add(self, name: str, folder: str, act: Act = "add") -> None:
        """Let a free name stand for the expert in a folder."""
        self._check_free(name)
        self._point(name, act, folder)

    def replace(self, name: str, folder: str) -> None:
        """Let a name stand for another expert; also where its pointer is damaged."""
        if not isinstance(self.heads.get(name), DamagedExpertError):
            present(self.heads, name, self._address)
        self._point(name, "replace", folder)

    def remove(self, name: str) -> None:
        """Let a name stand for nothing."""
        head = present(self.heads, name, self._address)
        self._point(name, "remove", head.folder, stands=False)

    def restore(self, name: str, folder: str | None) -> None:
        """Let a name stand for what it stood for before it was removed, or for a folder's."""
        head = self.heads.get(name)
        if folder is None and isinstance(head, DamagedExpertError):
            raise head
        if folder is None and head is None:
            raise MissingExpertError(f"{self._address}: there was never an expert {name!r}")
        if folder is None and isinstance(head, Pointer):
            if head.present:
                raise NameTakenError(
                    f"{self._address}: the expert {name!r} is there; to go back to an older one, "
                    "name its version, one of its history"
                )
            folder = head.folder
        self._point(name, "restore", str(folder))

    def rename(self, old: str, new: str) -> None:
        """Let a free name stand for what another one stood for, which stands for nothing then."""
        head = present(self.heads, old, self._address)
        self._check_free(new)
        self._point(new, "rename", head.folder, other=old)
        self._point(old, "rename", head.folder, other=new, stands=False)

    def created(self, *, whole: bool) -> dict[str, bytes]:
        """The files to create, in order, where all of a change appears at once and where not."""
        if len(self._pointers) < 2 or whole:
            return {pointer.path: pointer.contents() for pointer in self._pointers}
        commit = uuid.uuid4().hex
        pointers = [replace(pointer, commit=commit) for pointer in self._pointers]
        return {
            **{pointer.path: pointer.contents() for pointer in pointers},
            commit_path(commit): fate_contents(commit, (pointer.path for pointer in pointers)),
        }

    def _check_free(self, name: str) -> None:
        head = self.heads.get(name)
        if isinstance(head, DamagedExpertError):
            raise head
        if head is not None and head.present:
            raise NameTakenError(
                f"{self._address} has an expert {name!r} already (version {head.version[:12]}, "
                f"since {head.at}): choose another name, or replace it"
            )

    def _point(
        self, name: str, act: Act, folder: str, *, other: str | None = None, stands: bool = True
    ) -> None:
        if commits := self.index.open.get(name):
            raise UnsettledError(commits)
        self._last[name] = self._last.get(name, 0) + 1
        pointer = Pointer(
            name=name, number=self._last[name], act=act, present=stands, folder=folder,
            other=other, at=now(), nonce=uuid.uuid4().hex,
        )  # fmt: skip
        self._pointers.append(pointer)
        self.heads[name] = pointer
