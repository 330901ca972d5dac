"""The stores that fsspec reaches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from mole_vl.library.disk import Disk
from mole_vl.library.errors import TakenError
from mole_vl.library.stores import AT_ONCE, README, Change, Store


@dataclass(frozen=True)
class FileStore(Store):
    """A folder of a file system of fsspec.

    Args:
        address: As the library was opened.
        files: The file system.
        root: The library's folder in it.
        exclusive: Whether the file system creates a file for one writer alone. Another kind is
            read, and not written to.
    """

    address: str
    files: AbstractFileSystem
    root: str
    exclusive: bool = True

    def mark(self) -> None:
        """There is but one state, the present."""

    def find(self, folder: str, mark: str | None = None) -> dict[str, int]:
        """As of `Store`; files that are being written, and foreign hidden ones, are left out."""
        self.files.invalidate_cache()
        found = self._below(self._path(folder))
        root = self._plain(self.root).rstrip("/")
        paths = {
            self._plain(path).removeprefix(root).lstrip("/"): entry for path, entry in found.items()
        }
        return {
            path: int(entry["size"])
            for path, entry in paths.items()
            if not path.rpartition("/")[2].startswith(".")
        }

    def read(self, paths: Iterable[str], mark: str | None = None) -> dict[str, bytes]:
        """As of `Store`, several at once."""
        wanted = list(paths)
        found = self._each(self._content, wanted)
        return {
            path: content
            for path, content in zip(wanted, found, strict=True)
            if content is not None
        }

    def local(self, folder: str) -> Path | None:
        """The folder itself, if the store is this machine's disk."""
        return Path(self._path(folder)) if isinstance(self.files, Disk) else None

    def stage(self, files: Mapping[str, bytes]) -> Sequence[Any]:
        """Written at once, in their order: the last one says that the others are there."""
        self._check_writable()
        for path, content in files.items():
            self.files.pipe_file(self._path(path), content)
        return ()

    def commit(self, change: Change, mark: str | None = None) -> None:
        """Create the files one after the other; the last one is what makes them count."""
        self._check_writable()
        for path, content in change.created.items():
            self._create(path, content)
        self.derive(change.readme)

    def ensure(self, created: Mapping[str, bytes]) -> None:
        """As of `Store`; a bucket or container is made too."""
        self._check_writable()
        # adlfs makes a container in mkdir alone.
        with suppress(FileExistsError):
            self.files.mkdir(self.root, create_parents=True)
        for path, content in created.items():
            with suppress(TakenError):
                self._create(path, content)
            self._check_exclusive(path)

    def derive(self, readme: bytes) -> None:
        """Replace the list in one put."""
        self.files.pipe_file(self._path(README), readme)

    def _create(self, path: str, content: bytes) -> None:
        try:
            self.files.pipe_file(self._path(path), content, mode="create")
        except FileExistsError as error:
            # An answer may have been lost on its way, and the request sent again.
            if self._content(path) != content:
                raise TakenError(path) from error

    def _content(self, path: str) -> bytes | None:
        try:
            return bytes(self.files.cat_file(self._path(path)))  # pyright: ignore[reportArgumentType]
        except FileNotFoundError:
            return None

    def _each(self, function: Callable[[str], bytes | None], paths: Sequence[str]) -> list:
        if len(paths) < 2:
            return [function(path) for path in paths]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(function, paths))

    def _below(self, path: str) -> dict[str, Any]:
        """The entries, as fsspec's, of the files under a folder.

        fsspec's `find` walks folders and passes over one that cannot be listed, as if it were
        empty; on object stores, which have no folders, it asks for all files at once.
        """
        try:
            if self.files.async_impl:
                return dict(self.files.find(path, detail=True))
            entries: Any = self.files.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        found = {}
        for entry in entries:
            below = entry["type"] == "directory"
            found |= self._below(entry["name"]) if below else {entry["name"]: entry}
        return found

    def _plain(self, path: str) -> str:
        """A path as the file system itself writes it."""
        return str(self.files._strip_protocol(path))

    def _path(self, path: str) -> str:
        # The root of an archive is empty.
        return f"{self.root.rstrip('/')}/{path}".removeprefix("" if self.root else "/")

    def _check_exclusive(self, path: str) -> None:
        """Raise ValueError if a file that is there can be created: some servers promise in vain."""
        try:
            self.files.pipe_file(
                self._path(path), self.files.cat_file(self._path(path)), mode="create"
            )
        except FileExistsError:
            return
        raise ValueError(
            f"{self.address}: this server creates {path} a second time without a word, so two "
            "writers at once could overwrite each other: keep the library in another store"
        )

    def _check_writable(self) -> None:
        if not self.exclusive:
            raise ValueError(
                f"{self.address}: two writers at once could overwrite each other here "
                f"({type(self.files).__name__} does not promise to create a file for one alone), "
                "so the library is read, not written to: clone it to a disk, s3, gs, az or hf"
            )
