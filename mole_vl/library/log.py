"""What the pointers of a library say together, now.

A change of one name counts from the moment its pointer is created. One of several names (a rename,
a batch, a clone) creates its pointers first; they count from the moment that the change's fate,
one more file, is created. Whoever finds such a pointer without a fate may end the change by
creating that file, empty: of the two, one succeeds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mole_vl.library.errors import DamagedExpertError, MissingExpertError
from mole_vl.library.names import word_fault
from mole_vl.library.pointers import (
    COMMITS,
    NAMES,
    Pointer,
    commit_path,
    numbers,
    pointer_path,
    read_fate,
    read_pointer,
)
from mole_vl.library.stores import Store

_LOOKS = 5


@dataclass(frozen=True, kw_only=True)
class Index:
    """What every name stands for, in one state.

    Args:
        mark: The state, where the store keeps states apart.
        heads: Each name's pointer that counts, or what is wrong with it.
        last: The number of each name's last pointer, whether it counts or not.
        open: Changes of several names that have no fate yet, by the names that they touch.
        files: The pointers and fates that were seen.
    """

    mark: str | None
    heads: Mapping[str, Pointer | DamagedExpertError]
    last: Mapping[str, int]
    open: Mapping[str, frozenset[str]]
    files: frozenset[str]

    def present(self) -> list[str]:
        """The names that stand for an expert, damaged ones too."""
        return [
            name
            for name, head in self.heads.items()
            if isinstance(head, DamagedExpertError) or head.present
        ]


class Log:
    """Reader of a store's pointers; what it has read once, it keeps: those files never change."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._kept: dict[str, bytes] = {}

    def read(self) -> Index:
        """What every name stands for now."""
        index, stale = self._look()
        for _ in range(_LOOKS - 1):
            # A listing may have passed a pointer's place before the pointer was there.
            if stale:
                index, stale = self._look()
        return index

    def history(self, name: str) -> tuple[Pointer, ...]:
        """All of a name's pointers that count, the first one first.

        Raises:
            MissingExpertError: The name has none.
            DamagedExpertError: One of them cannot be read, or is missing.
        """
        mark = self.store.mark()
        # A name that leaves its folder would have all that lies there looked through.
        looked = not word_fault("name", name)
        fates = self.store.find(COMMITS, mark) if looked else {}
        found = numbers(self.store.find(f"{NAMES}/{name}", mark)).get(name) if looked else None
        if not found:
            raise MissingExpertError(f"{self.store.address}: there was never an expert {name!r}")
        paths = [pointer_path(name, number) for number in range(1, found[-1] + 1)]
        contents = self._contents(paths, mark)
        history = []
        for path in paths:
            try:
                pointer = self._pointer(path, contents)
                counts = self._counts(pointer, frozenset(fates), mark)
            except ValueError as error:
                raise self._damage(name, error) from error
            history += [pointer] if counts else []
        return tuple(history)

    def version(self, name: str, version: str) -> Pointer:
        """The pointer by which a name stood for a version.

        Args:
            name: The name.
            version: The version, or as much of its beginning as tells it apart.

        Raises:
            MissingExpertError: It never stood for that, or for several that begin so.
            DamagedExpertError: As of `history`.
        """
        stood = {pointer.version: pointer for pointer in self.history(name) if pointer.present}
        found = [pointer for known, pointer in stood.items() if known.startswith(version)]
        if len(found) != 1 or not version:
            versions = ", ".join(known[:12] for known in stood)
            raise MissingExpertError(
                f"{self.store.address}: {version!r} is no version of {name!r}; it had {versions}"
            )
        return found[0]

    def _look(self) -> tuple[Index, bool]:
        """What is found now, and whether that misses pointers which a change made."""
        mark = self.store.mark()
        # A change's fate is created after its pointers: listed before them, it could be missed
        # beside pointers that a later change built on it.
        names = self.store.find(NAMES, mark)
        files = frozenset(names) | frozenset(self.store.find(COMMITS, mark))
        found = numbers(files)
        heads: dict[str, Pointer | DamagedExpertError] = {}
        unsettled: dict[str, set[str]] = {}
        looked = {name: list(those) for name, those in found.items()}
        while looked:
            paths = {name: pointer_path(name, those.pop()) for name, those in looked.items()}
            contents = self._contents(paths.values(), mark)
            self._contents(_fates(contents) & files, mark)
            for name, path in paths.items():
                try:
                    pointer = self._pointer(path, contents)
                    if self._counts(pointer, files, mark):
                        heads[name] = pointer
                    elif commit_path(str(pointer.commit)) not in files:
                        unsettled.setdefault(name, set()).add(str(pointer.commit))
                except ValueError as error:
                    heads[name] = self._damage(name, error)
            looked = {name: those for name, those in looked.items() if those and name not in heads}
        stale = self._add_missing(heads, files)
        return Index(
            mark=mark,
            heads=dict(sorted(heads.items())),
            last={name: those[-1] for name, those in found.items()},
            open={name: frozenset(commits) for name, commits in unsettled.items()},
            files=files,
        ), stale

    def _add_missing(
        self, heads: dict[str, Pointer | DamagedExpertError], files: frozenset[str]
    ) -> bool:
        """Whether a change made pointers that are not there; their names are damaged then."""
        fates = {
            commit_path(head.commit)
            for head in heads.values()
            if isinstance(head, Pointer) and head.commit
        }
        stale = False
        for fate in fates:
            missing = read_fate(self._kept[fate], fate) - files if fate in self._kept else ()
            for name, those in numbers(missing).items():
                head = heads.get(name)
                stale = True
                if not isinstance(head, Pointer) or head.number < those[-1]:
                    path = pointer_path(name, those[-1])
                    heads[name] = self._damage(name, ValueError(f"{path}, of {fate}, is missing"))
        return stale

    def _counts(self, pointer: Pointer, files: frozenset[str], mark: str | None) -> bool:
        if pointer.commit is None:
            return True
        fate = commit_path(pointer.commit)
        if fate not in files:
            return False
        content = self._contents([fate], mark).get(fate)
        if content is None:
            raise ValueError(f"{fate} is missing")
        return pointer.path in read_fate(content, fate)

    def _pointer(self, path: str, contents: Mapping[str, bytes]) -> Pointer:
        if path not in contents:
            raise ValueError(f"{path} is missing")
        return read_pointer(contents[path], path)

    def _contents(self, paths: Iterable[str], mark: str | None) -> dict[str, bytes]:
        wanted = list(paths)
        new = [path for path in wanted if path not in self._kept]
        self._kept.update(self.store.read(new, mark))
        return {path: self._kept[path] for path in wanted if path in self._kept}

    def _damage(self, name: str, error: ValueError) -> DamagedExpertError:
        return DamagedExpertError(
            f"expert {name!r} of {self.store.address} is damaged: {error}; bring the file back "
            f"from a copy of the library, or restore({name!r}, version=...) one of its versions "
            f"under experts/, or add it anew with replace",
            name,
        )


def _fates(contents: Mapping[str, bytes]) -> frozenset[str]:
    """Paths of the fates that these pointers hang on; damaged ones are told of elsewhere."""
    found = set()
    for path, content in contents.items():
        try:
            found.add(read_pointer(content, path).commit)
        except ValueError:
            continue
    return frozenset(commit_path(commit) for commit in found if commit)
