"""Weights of stored experts: checked by their hashes, and read from memory-mapped files."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mole_vl.experts import Expert
from mole_vl.files import new_folder
from mole_vl.library.catalogue import Catalogue
from mole_vl.library.info import ExpertInfo
from mole_vl.library.seals import sha256
from mole_vl.peft_folder import read_peft, read_peft_contents

_PIECE = 2**20


@dataclass(frozen=True, eq=False)
class StoredExpert:
    """An expert of a library, whose weights are read when they are first asked for.

    Args:
        info: What is known of it.
        catalogue: The library's.
        folder: Its folder in the library.
        mark: The library's state in which it was found.
        cache: Where files of other machines are kept; None keeps them in memory alone.
    """

    info: ExpertInfo
    catalogue: Catalogue
    folder: str
    mark: str | None
    cache: Path | None

    def __repr__(self) -> str:
        return f"StoredExpert({self.info.name!r}, {self.folder} of {self.catalogue.store.address})"

    @cached_property
    def expert(self) -> Expert:
        """The expert; its factors are views of a memory-mapped file, if it comes from one.

        Raises:
            DamagedExpertError: A file is missing, or not as it was written.
        """
        folder = self.path
        if folder is None:
            where = f"{self.catalogue.store.address}/{self.folder}"
            return read_peft_contents(self.contents(), self.info.name, where)
        return read_peft(folder, self.info.name)

    @cached_property
    def path(self) -> Path | None:
        """Its folder on this machine's disk, fetched if need be; None if it is kept in memory.

        Raises:
            DamagedExpertError: As of `expert`.
        """
        own = self.catalogue.store.local(self.folder)
        if own is not None:
            self._refuse(self._faults(own))
            return own
        if self.cache is None:
            return None
        kept = self.cache / self.info.version
        if not kept.is_dir() or any(self._faults(kept).values()):
            with new_folder(kept) as partial:
                for file, content in self.contents().items():
                    (partial / file).write_bytes(content)
        return kept

    def contents(self) -> dict[str, bytes]:
        """What its files hold, by their names.

        Raises:
            DamagedExpertError: As of `expert`.
        """
        paths = {file: f"{self.folder}/{file}" for file in self.info.files}
        read = self.catalogue.store.read(paths.values(), self.mark)
        found = {file: read[path] for file, path in paths.items() if path in read}
        self._refuse(
            {
                file: self._fault(file, sha256(found[file]) if file in found else None)
                for file in paths
            }
        )
        return found

    def _faults(self, folder: Path) -> dict[str, str | None]:
        return {file: self._fault(file, _file_sha256(folder / file)) for file in self.info.files}

    def _fault(self, file: str, found: str | None) -> str | None:
        expected = self.info.files[file].sha256
        if found is None:
            return f"{self.folder}/{file} is missing"
        if found != expected:
            return f"{self.folder}/{file} has SHA-256 {found}, expected {expected}"
        return None

    def _refuse(self, faults: Mapping[str, str | None]) -> None:
        found = [fault for fault in faults.values() if fault]
        if found:
            raise self.catalogue.damage(self.info.name, "; ".join(found))


def _file_sha256(file: Path) -> str | None:
    """SHA-256 of a file, read in pieces; None if it is missing."""
    if not file.is_file():
        return None
    state = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            state.update(piece)
    return state.hexdigest()
