"""A library of experts: a folder, a container, a bucket, a repository of the Hub, or memory."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from mole_vl.experts import Expert
from mole_vl.files import check_replaceable, new_folder
from mole_vl.library.addresses import cache_folder, open_store
from mole_vl.library.auxiliary import Auxiliary
from mole_vl.library.batch import Batch
from mole_vl.library.catalogue import Catalogue, Listing
from mole_vl.library.checking import Report, checked
from mole_vl.library.cloning import clone, sound
from mole_vl.library.disk import Memory
from mole_vl.library.file_store import FileStore
from mole_vl.library.info import About, ExpertInfo
from mole_vl.library.log import Log
from mole_vl.library.pointers import Pointer
from mole_vl.library.scores import Scores
from mole_vl.library.seals import sealed, unsealed
from mole_vl.library.stores import Store
from mole_vl.library.weights import StoredExpert
from mole_vl.peft_folder import CONFIG, WEIGHTS

FORMAT = "mole-vl library 1"
MARKER = "library.json"
# Of a library of tasks (`nlp.task_library`).
TASKS_MARKER = "tasks.json"


class ExpertLibrary:
    """Experts by name. Iterating over it gives the names; `library[name]` is `library.get(name)`.

    Args:
        store: Where it lies; `ExpertLibrary.open` makes one from an address.
        cache: Where weights of other machines' stores are kept.
    """

    def __init__(self, store: Store, cache: Path) -> None:
        self._store = store
        self._catalogue = Catalogue(store, Log(store))
        held = isinstance(store, FileStore) and isinstance(store.files, Memory)
        self._cache = None if held else cache
        self.auxiliary = Auxiliary(self._catalogue, self.batch)
        self.scores = Scores(self._catalogue, self.batch)

    @staticmethod
    def open(
        uri: str | Path,
        token: str | None = None,
        destination: str | None = None,
        *,
        create: bool = False,
        options: Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
    ) -> "ExpertLibrary":
        """Open the library at an address.

        Args:
            uri: `local://FOLDER` (or a path), `virtual://WORD` (this process's memory),
                `hf://USER/REPO`, `az://ACCOUNT/CONTAINER`, or any address of fsspec, such as
                `s3://BUCKET/FOLDER` or `gs://BUCKET/FOLDER`.
            token: The credential: of the Hub a token, of Azure a SAS or a connection string.
            destination: An address to clone the library to; the clone is what is opened. It is
                reached without the token: clone from Python if it needs one.
            create: Whether to begin a library where there is none.
            options: Further arguments of fsspec's file system, or of the Hub's client.
            cache: Where weights of other machines' stores are kept; MOLE_VL_CACHE, or a folder of
                the user's cache, if not given.

        Raises:
            FileNotFoundError: There is no library, and none is to be begun.
            ValueError: The address is none, or what is there is no library of this format.
            ModuleNotFoundError: An extra is not installed; the message names it.
        """
        store = open_store(str(uri), token, options)
        if create:
            _check_place(store)
            store.ensure({MARKER: sealed({"format": FORMAT})})
        _check_marker(store)
        library = ExpertLibrary(store, Path(cache) if cache else cache_folder() / "experts")
        return library if destination is None else library.clone(destination, cache=cache)

    @property
    def address(self) -> str:
        """Where it was opened."""
        return self._store.address

    def __repr__(self) -> str:
        return f"ExpertLibrary({self.address!r})"

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalogue.log.read().present())

    def __len__(self) -> int:
        return len(self._catalogue.log.read().present())

    def __contains__(self, name: object) -> bool:
        return name in self._catalogue.log.read().present()

    def __getitem__(self, name: str) -> StoredExpert:
        return self.get(name)

    def get(self, name: str, version: str | None = None) -> StoredExpert:
        """An expert: `.info` at once, `.expert` when it is first asked for.

        Args:
            name: Its name.
            version: The beginning of one of those in `history(name)`; the present one if not given.

        Raises:
            MissingExpertError: There is none of this name or version; it is a KeyError.
            DamagedExpertError: What the library says of it is not as it was written.
        """
        index = self._catalogue.log.read()
        if version is None:
            head, info = self._catalogue.info(index.heads, name, index.mark)
        else:
            head = self._catalogue.log.version(name, version)
            _, info = self._catalogue.info({name: head}, name, index.mark)
        return StoredExpert(info, self._catalogue, head.folder, index.mark, self._cache)

    def list(self) -> Listing:
        """All experts, without reading their weights: the sound, the damaged, the removed."""
        return self._catalogue.listing(self._catalogue.log.read())

    def history(self, name: str) -> tuple[Pointer, ...]:
        """All that a name has stood for, the first one first.

        Raises:
            MissingExpertError: There was never an expert of this name.
            DamagedExpertError: A part of it cannot be read.
        """
        return self._catalogue.log.history(name)

    def check(self) -> Report:
        """Read every file, and report each that is not as it was written."""
        return checked(self._catalogue, self._cache)

    def batch(self, message: str | None = None) -> Batch:
        """Changes that count together, from the end of a `with` block on: none of them, or all.

        Args:
            message: What they do, for the Hub's log.
        """
        return Batch(self._catalogue, message)

    def add(self, expert: Expert, **about: Unpack[About]) -> ExpertInfo:
        """Add an expert under its name; as of `Batch.add`."""
        with self.batch() as batch:
            return batch.add(expert, **about)

    def replace(self, expert: Expert, **about: Unpack[About]) -> ExpertInfo:
        """Put an expert in place of the one of its name; as of `Batch.replace`."""
        with self.batch() as batch:
            return batch.replace(expert, **about)

    def import_peft(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        replace: bool = False,
        **about: Unpack[About],
    ) -> ExpertInfo:
        """Add a PEFT LoRA folder's two files, byte for byte; as of `Batch.import_peft`."""
        with self.batch() as batch:
            return batch.import_peft(folder, name, replace=replace, **about)

    def export_peft(self, name: str, folder: str | Path) -> None:
        """Write an expert's two files as a PEFT LoRA folder, byte for byte, in one rename.

        Raises:
            ValueError: The folder holds something else, which would be lost.
            MissingExpertError: There is none of this name.
            DamagedExpertError: Its files are not as they were written.
        """
        check_replaceable("folder", Path(folder), (CONFIG, WEIGHTS), "a PEFT LoRA")
        contents = self.get(name).contents()
        with new_folder(Path(folder)) as partial:
            for file, content in contents.items():
                (partial / file).write_bytes(content)

    def remove(self, name: str) -> None:
        """Remove an expert softly; as of `Batch.remove`."""
        with self.batch() as batch:
            batch.remove(name)

    def restore(self, name: str, version: str | None = None) -> None:
        """Bring a removed expert or an older version back; as of `Batch.restore`."""
        with self.batch() as batch:
            batch.restore(name, version)

    def rename(self, old: str, new: str) -> None:
        """Give an expert another name; as of `Batch.rename`."""
        with self.batch() as batch:
            batch.rename(old, new)

    def clone(
        self,
        uri: str | Path,
        token: str | None = None,
        *,
        names: Iterable[str] | None = None,
        options: Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
    ) -> "ExpertLibrary":
        """Copy the experts and their auxiliary data to another address, in one change there.

        What was removed or replaced stays behind. A clone that was broken off goes on when it is
        made again; experts that are there already, at the same version, are left alone.

        Args:
            uri: As of `open`; a library is begun there if there is none.
            token: As of `open`.
            names: The experts; all if not given.
            options: As of `open`.
            cache: As of `open`.

        Raises:
            MissingExpertError: There is no expert of a name.
            DamagedExpertError: An expert is damaged; nothing is copied. Name the others in `names`.
            NameTakenError: Another expert or version has a name there; nothing is copied.
        """
        wanted = None if names is None else list(names)
        # Before a library is begun there.
        sound(self._catalogue, self._catalogue.log.read(), wanted)
        target = ExpertLibrary.open(uri, token, create=True, options=options, cache=cache)
        clone(self._catalogue, target._catalogue, wanted)
        return target


def _check_place(store: Store) -> None:
    """Raise ValueError where tasks lie: each would write its own list over the other's."""
    found = store.read([MARKER, TASKS_MARKER], store.mark())
    if TASKS_MARKER in found and MARKER not in found:
        raise ValueError(
            f"{store.address}: a library of tasks is here, expected a place of the experts' own: "
            "take another address"
        )


def _check_marker(store: Store) -> None:
    content = store.read([MARKER], store.mark()).get(MARKER)
    if content is None:
        raise FileNotFoundError(
            f"{store.address}: there is no library here ({MARKER} is missing): check the address, "
            "and the token if it asks for one; create=True begins a library, as the first "
            "`mole library add` does"
        )
    said = unsealed(content, f"{store.address}: {MARKER}").get("format")
    if said != FORMAT:
        raise ValueError(
            f"{store.address}: {MARKER} says {said!r}, expected {FORMAT!r}: a newer mole-vl may "
            "read it"
        )
