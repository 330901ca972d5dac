"""What libraries and their stores say, as the faults of a program."""

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from mole_vl.library.errors import ContendedError, MissingExpertError, MissingScoreError
from mole_vl.library.stores import Store


@contextmanager
def faults_of_libraries() -> Iterator[None]:
    """What a library says of names, writers, extras and its store, as `as_messages` tells it.

    A store that cannot be reached, read or written raises what its file system, its service's
    client or the disk has to say, each in kinds of its own.

    Raises:
        ValueError: In place of all of them.
    """
    try:
        yield
    except (MissingExpertError, MissingScoreError, ContendedError, ModuleNotFoundError) as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        store = _failing_store(error)
        if store is None:
            raise
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{store.address}: the store could not be read or written: {type(error).__name__}: "
            f"{said}; check the address, the rights there, and for another machine's the "
            "credentials and the network"
        ) from error


def _failing_store(error: Exception) -> Store | None:
    """The store in whose work others raised an error, if one did."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    own = frames[-1].f_globals.get("__name__", "").partition(".")[0] == "mole_vl"
    # The disk's errors have no frame of their own.
    if own and not isinstance(error, OSError):
        return None
    holders = (frame.f_locals.get("self") for frame in frames)
    return next((holder for holder in holders if isinstance(holder, Store)), None)
