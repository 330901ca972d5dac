"""Every file of a library read, and what is not as it was written."""

from dataclasses import dataclass
from pathlib import Path

from mole_vl.library.auxiliary_files import AUXILIARY, faults_of_data
from mole_vl.library.catalogue import EXPERTS, Catalogue
from mole_vl.library.errors import DamagedExpertError
from mole_vl.library.info import ExpertInfo
from mole_vl.library.pointers import Pointer
from mole_vl.library.weights import StoredExpert


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found wrong with a library.

    Args:
        faults: One sentence each: files that are damaged or missing.
        leftovers: Folders of experts that no name ever stood for, and changes without a fate: of
            writers that were killed or are still at it; or else, their pointers were deleted.
    """

    faults: tuple[str, ...]
    leftovers: tuple[str, ...]


def checked(catalogue: Catalogue, cache: Path | None) -> Report:
    """Read all there is: pointers, older versions and auxiliary data too."""
    index, store = catalogue.log.read(), catalogue.store
    faults: list[str] = []
    pointers: dict[str, Pointer] = {}
    for name in index.last:
        head = index.heads.get(name)
        faults += [str(head)] if isinstance(head, DamagedExpertError) else []
        try:
            pointers |= {pointer.folder: pointer for pointer in catalogue.log.history(name)}
        except DamagedExpertError as error:
            faults += [str(error)] if not isinstance(head, DamagedExpertError) else []
            pointers |= {head.folder: head} if isinstance(head, Pointer) else {}
    for folder, pointer in pointers.items():
        info = catalogue.infos([pointer], index.mark)[pointer.name]
        if isinstance(info, ExpertInfo):
            try:
                StoredExpert(info, catalogue, folder, index.mark, cache).contents()
            except DamagedExpertError as error:
                faults.append(str(error))
        else:
            faults.append(str(info))
    data = store.read(store.find(AUXILIARY, index.mark), index.mark)
    faults += [f"{store.address}: {fault}" for fault in faults_of_data(data)]
    folders = {path.rpartition("/")[0] for path in store.find(EXPERTS, index.mark)}
    unfinished = {f"change {commit}" for commits in index.open.values() for commit in commits}
    return Report(
        faults=tuple(faults),
        leftovers=tuple(sorted((folders - pointers.keys()) | unfinished)),
    )
