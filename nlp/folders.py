"""Folders that are complete or absent."""

import tempfile
from collections.abc import Callable
from pathlib import Path


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill `folder` by `write(partial)` and one rename: it is complete or absent.

    Two processes may do so at once; the second to finish drops its copy.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        write(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
