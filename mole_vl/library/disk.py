"""The disk and the memory as stores: a file appears whole, and of several creators one succeeds.

fsspec's own local file system writes in place, and for `mode="create"` looks first and writes
then: a reader may see half a file, and two writers may both succeed.
"""

import errno
import os
from pathlib import Path
from threading import Lock
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from mole_vl.files import new_file

_LINKLESS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP)


class Disk(LocalFileSystem):
    """fsspec's local file system; `pipe_file` makes files that are complete or absent."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """As fsspec's, in one step, through to the disk.

        Raises:
            FileExistsError: The mode is "create", and another file is there.
            OSError: The disk cannot create a file for one writer alone.
        """
        try:
            self._write(Path(path), value, alone=mode == "create")
        except OSError as error:
            if error.errno not in _LINKLESS or mode != "create":
                raise
            raise OSError(
                error.errno,
                "this disk knows no hard links, so two writers at once could overwrite each other: "
                "keep the library on another one",
                path,
            ) from error

    def _write(self, path: Path, value: bytes, *, alone: bool) -> None:
        with new_file(path, alone=alone) as partial, partial.open("wb") as file:
            file.write(value)
            file.flush()
            # A pointer must not outlive, through a power failure, what it points to.
            os.fsync(file.fileno())


class Memory(MemoryFileSystem):
    """fsspec's memory of this process; of several threads that create one file, one succeeds."""

    _creating = Lock()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """As fsspec's."""
        with self._creating:
            super().pipe_file(path, value, mode, **kwargs)
