"""A library of experts on disk, in memory, on object stores, or on the Hugging Face Hub."""

try:
    import fsspec as fsspec
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mole_vl.library needs fsspec, which is not installed: pip install 'mole-vl[library]'"
    ) from error

from mole_vl.library.batch import Batch as Batch
from mole_vl.library.catalogue import Listing as Listing
from mole_vl.library.checking import Report as Report
from mole_vl.library.errors import (
    ContendedError as ContendedError,
    DamagedExpertError as DamagedExpertError,
    MissingExpertError as MissingExpertError,
    MissingScoreError as MissingScoreError,
    NameTakenError as NameTakenError,
)
from mole_vl.library.info import ExpertInfo as ExpertInfo
from mole_vl.library.library import ExpertLibrary as ExpertLibrary
from mole_vl.library.pointers import Pointer as Pointer
from mole_vl.library.weights import StoredExpert as StoredExpert
