"""What a library knows of its experts without their weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mole_vl.faults import some
from mole_vl.library.errors import DamagedExpertError, MissingExpertError
from mole_vl.library.info import INFO, ExpertInfo, read_info
from mole_vl.library.log import Index, Log
from mole_vl.library.pointers import Pointer
from mole_vl.library.stores import Store

EXPERTS = "experts"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The experts of a library.

    Args:
        experts: What is known of each sound one, by name.
        damaged: What is wrong with each other one, by name.
        removed: What every removed or renamed expert's last pointer says; `restore` brings it back.
    """

    experts: Mapping[str, ExpertInfo]
    damaged: Mapping[str, str]
    removed: Mapping[str, Pointer]


@dataclass(frozen=True)
class Catalogue:
    """Reader of what is known of experts; what it has read once, it keeps: it never changes."""

    store: Store
    log: Log
    _kept: dict[str, ExpertInfo] = field(default_factory=dict)

    def keep(self, info: ExpertInfo) -> None:
        """Know an expert that is being added."""
        self._kept[info.version] = info

    def infos(
        self, heads: Iterable[Pointer | DamagedExpertError], mark: str | None
    ) -> dict[str, ExpertInfo | DamagedExpertError]:
        """What is known of each of these experts, or what is wrong with it, by name."""
        listed = list(heads)
        new = [
            f"{head.folder}/{INFO}"
            for head in listed
            if isinstance(head, Pointer) and head.version not in self._kept
        ]
        contents = self.store.read(new, mark)
        return {
            head.name: head if isinstance(head, DamagedExpertError) else self._info(head, contents)
            for head in listed
        }

    def info(
        self, heads: Mapping[str, Pointer | DamagedExpertError], name: str, mark: str | None
    ) -> tuple[Pointer, ExpertInfo]:
        """A name's pointer, and what is known of the expert that it stands for.

        Raises:
            MissingExpertError: It stands for none.
            DamagedExpertError: Its pointer or its `expert.json` is damaged.
        """
        head = present(heads, name, self.store.address)
        info = self.infos([head], mark)[name]
        if isinstance(info, DamagedExpertError):
            raise info
        return head, info

    def listing(self, index: Index) -> Listing:
        """All experts; that their files are there, at their lengths, is looked up too."""
        names = index.present()
        infos = self.infos([index.heads[name] for name in names], index.mark)
        lengths = self.store.find(EXPERTS, index.mark)
        for name, info in infos.items():
            head = index.heads[name]
            if isinstance(info, ExpertInfo) and isinstance(head, Pointer):
                infos[name] = self._complete(head, info, lengths)
        return Listing(
            experts={name: info for name, info in infos.items() if isinstance(info, ExpertInfo)},
            damaged={
                name: str(i) for name, i in infos.items() if isinstance(i, DamagedExpertError)
            },
            removed={
                name: head
                for name, head in index.heads.items()
                if isinstance(head, Pointer) and not head.present
            },
        )

    def damage(self, name: str, fault: str) -> DamagedExpertError:
        """The error of an expert whose files are not as they were written."""
        return DamagedExpertError(
            f"expert {name!r} of {self.store.address} is damaged: {fault}; bring the file back "
            "from a copy of the library, or add the expert anew with replace",
            name,
        )

    def _info(
        self, head: Pointer, contents: Mapping[str, bytes]
    ) -> ExpertInfo | DamagedExpertError:
        path = f"{head.folder}/{INFO}"
        kept = self._kept.get(head.version)
        try:
            if kept is None and path not in contents:
                return self.damage(head.name, f"{path} is missing")
            if kept is None or kept.name != head.name:
                kept = (
                    read_info(contents[path], head.name, head.version, path)
                    if kept is None
                    else kept.named(head.name)
                )
                self._kept[head.version] = kept
        except ValueError as error:
            return self.damage(head.name, str(error))
        return kept

    def _complete(
        self, head: Pointer, info: ExpertInfo, lengths: Mapping[str, int]
    ) -> ExpertInfo | DamagedExpertError:
        for file, stored in info.files.items():
            path = f"{head.folder}/{file}"
            found = lengths.get(path)
            if found is None:
                return self.damage(info.name, f"{path} is missing")
            if found != stored.bytes:
                return self.damage(info.name, f"{path} has {found} bytes, expected {stored.bytes}")
        return info


def present(heads: Mapping[str, Pointer | DamagedExpertError], name: str, address: str) -> Pointer:
    """The pointer of a name that stands for an expert.

    Raises:
        MissingExpertError: It stands for none; the message says why.
        DamagedExpertError: Its pointer is damaged.
    """
    head = heads.get(name)
    if isinstance(head, DamagedExpertError):
        raise head
    if head is None:
        there = [
            other for other, head in heads.items() if isinstance(head, Pointer) and head.present
        ]
        known = some(there) or "none"
        raise MissingExpertError(f"{address} has no expert {name!r}; it has {known}")
    if not head.present and head.act == "rename":
        raise MissingExpertError(
            f"{address} has no expert {name!r}: it is called {head.other!r} since {head.at}"
        )
    if not head.present:
        raise MissingExpertError(
            f"{address} has no expert {name!r}: it was removed at {head.at}; "
            f"restore({name!r}) brings it back"
        )
    return head
