"""Data that were computed from an expert: prototypes, embeddings, by kind.

They are stored under the expert's version: those of a replaced expert do not apply to the new one,
and those of a renamed one go with it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mole_vl.library.auxiliary_files import AUXILIARY, latest_files, read_value
from mole_vl.library.batch import Batch
from mole_vl.library.catalogue import Catalogue, present
from mole_vl.library.errors import DamagedExpertError
from mole_vl.library.names import check_word


class Auxiliary:
    """The auxiliary data of a library's experts.

    Args:
        catalogue: What is known of the experts.
        batch: How a batch is begun.
    """

    def __init__(self, catalogue: Catalogue, batch: Callable[[], Batch]) -> None:
        self._catalogue = catalogue
        self._batch = batch

    def put(self, kind: str, values: Mapping[str, Any]) -> None:
        """Store data of a kind for several experts; older ones of the kind are out of date then.

        Args:
            kind: A word, such as `prototypes`.
            values: For each expert by name: tensors by name, or anything that JSON can hold.

        Raises:
            MissingExpertError: There is no such expert.
            ValueError: The kind is no plain word, or a value can be written as neither.
        """
        check_word("kind", kind)
        with self._batch() as batch:
            batch.attach(kind, values)

    def get(self, kind: str, name: str) -> Any:
        """The data of a kind for an expert, as they were put; None if there are none.

        Raises:
            MissingExpertError: There is no such expert.
            DamagedExpertError: The data are not as they were written.
        """
        check_word("kind", kind)
        return read_kind(self._catalogue, kind, [name]).get(name)

    def all(self, kind: str) -> dict[str, Any]:
        """The data of a kind for every expert that has some, by name.

        Raises:
            DamagedExpertError: An expert's pointer or its data are damaged; `get` reads the others.
        """
        check_word("kind", kind)
        return read_kind(self._catalogue, kind)

    def each(self, kind: str, names: Sequence[str]) -> dict[str, Any]:
        """The data of a kind for these experts, by name; those without any are left out.

        Raises:
            MissingExpertError: There is no expert of a name.
            DamagedExpertError: The data of one are not as they were written.
        """
        check_word("kind", kind)
        return read_kind(self._catalogue, kind, list(names))

    def kinds(self, name: str) -> list[str]:
        """The kinds of data that there are for an expert.

        Raises:
            MissingExpertError: There is no such expert.
        """
        index = self._catalogue.log.read()
        version = present(index.heads, name, self._catalogue.store.address).version
        found = self._catalogue.store.find(f"{AUXILIARY}/{version}", index.mark)
        return sorted({kind.partition("/")[0] for _, kind in latest_files(found)})


def read_kind(catalogue: Catalogue, kind: str, names: list[str] | None = None) -> dict[str, Any]:
    """The data of a kind for these experts or all, by name; those without any are left out."""
    index, store = catalogue.log.read(), catalogue.store
    latest = latest_files(store.find(AUXILIARY, index.mark))
    paths = {}
    for name in index.present() if names is None else names:
        version = present(index.heads, name, store.address).version
        if path := latest.get((version, kind)):
            paths[name] = path
    contents = store.read(paths.values(), index.mark)
    found = {}
    for name, path in paths.items():
        try:
            found[name] = read_value(contents.get(path), path)
        except ValueError as error:
            raise DamagedExpertError(
                f"{kind} of expert {name!r} of {store.address} are damaged: {error}; bring the "
                "file back from a copy of the library, or put them anew",
                name,
            ) from error
    return found
