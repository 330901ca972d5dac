"""Where a library lies: what it asks of a store."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AT_ONCE = 8
README = "README.md"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one commit writes, by paths in the library.

    Args:
        message: What it does, in words.
        staged: What `stage` gave for the files that it brings.
        created: Files that no other writer may have made before; in this order.
        readme: The list of experts as it is then.
    """

    message: str
    staged: Sequence[Any]
    created: Mapping[str, bytes]
    readme: bytes


class Store(ABC):
    """Files of a library by their paths in it; nothing that was created is ever changed.

    Args:
        address: For messages, and to open it again.
        whole: Whether all files of a change appear at once.
    """

    address: str
    whole: bool = False

    @abstractmethod
    def mark(self) -> str | None:
        """The state to read, where the store keeps states apart."""

    @abstractmethod
    def find(self, folder: str, mark: str | None) -> dict[str, int]:
        """Lengths of the files under a folder, by path; none where there is no such folder."""

    @abstractmethod
    def read(self, paths: Iterable[str], mark: str | None) -> dict[str, bytes]:
        """Contents of files; those that are not there are left out."""

    @abstractmethod
    def local(self, folder: str) -> Path | None:
        """A folder as one of this machine's disk, where it is."""

    @abstractmethod
    def stage(self, files: Mapping[str, bytes]) -> Sequence[Any]:
        """Bring files whose paths hold hashes of their contents; a change makes them count."""

    @abstractmethod
    def commit(self, change: Change, mark: str | None) -> None:
        """Write a change that was thought out on a state.

        Raises:
            TakenError: Another writer was quicker.
        """

    @abstractmethod
    def ensure(self, created: Mapping[str, bytes]) -> None:
        """Make a place for a library, and these files, unless they are there."""

    @abstractmethod
    def derive(self, readme: bytes) -> None:
        """Replace the list of experts alone, where a commit has not done so."""
