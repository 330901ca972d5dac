"""The disk and the memory as stores: a file appears whole, and of several creators one succeeds.

fsspec's own local file system writes in place, and for `mode="create"` looks first and writes
then: a reader may see half a file, and two writers may both succeed.
"""

import os
from pathlib import Path
from threading import Lock
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from mole_vl.files import new_file


class Disk(LocalFileSystem):
    """fsspec's local file system; `pipe_file` makes files that are complete or absent."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """As fsspec's, in one step, through to the disk.

        Raises:
            FileExistsError: The mode is "create", and another file is there.
        """
        with new_file(Path(path), alone=mode == "create") as partial, partial.open("wb") as file:
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
