"""One run at a time in one folder."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone_in(folder: Path, main: bool) -> Iterator[None]:
    """Keep other runs out of an output folder; a run that is killed lets go of it.

    Args:
        folder: The output folder.
        main: Whether this is the run's main process, which holds the lock for all.

    Raises:
        ValueError: Another run is at work there.
    """
    file = folder / ".lock"
    lock = FileLock(file, timeout=0)
    try:
        if main:
            lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another run is at work in {folder}: wait for its end, or take another folder"
        ) from error
    try:
        yield
    finally:
        if main:
            # Where an open file cannot be removed, it stays, and does no harm.
            with suppress(OSError):
                file.unlink()
            lock.release()
