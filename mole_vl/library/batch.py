"""Changes of a library that are made together."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from mole_vl.experts import Expert
from mole_vl.library.auxiliary_files import AUXILIARY, next_file
from mole_vl.library.catalogue import EXPERTS, Catalogue, present
from mole_vl.library.errors import DamagedExpertError, MissingExpertError
from mole_vl.library.info import INFO, About, ExpertInfo, described
from mole_vl.library.names import check_word
from mole_vl.library.pointers import Pointer
from mole_vl.library.transaction import Transaction
from mole_vl.peft_folder import CONFIG, WEIGHTS, peft_contents


class Batch:
    """Changes that count together, from the end of the `with` block on; after an error, none does.

    Each is checked when it is asked for. If another writer changes the library meanwhile, they are
    thought out anew on what it is then, and checked again.
    """

    def __init__(self, catalogue: Catalogue, message: str | None = None) -> None:
        self._catalogue, self._store = catalogue, catalogue.store
        self._message = message
        self._transaction = Transaction(catalogue)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self._transaction.commit(self._message)

    def add(self, expert: Expert, **about: Unpack[About]) -> ExpertInfo:
        """Add an expert under its name.

        Args:
            expert: Ranks, scales and targets may differ by layer.
            about: `task` and `licence`, words, and `training`, any JSON object.

        Raises:
            NameTakenError: There is one of this name; it is a ValueError.
            ValueError: The name would not do as a part of an address, or `training` is no JSON.
        """
        contents = peft_contents(expert)
        return self._take("add", expert.name, contents, about)

    def replace(self, expert: Expert, **about: Unpack[About]) -> ExpertInfo:
        """Put an expert in place of the one of its name, which stays in `history`.

        What was computed from the older one does not apply to it. Arguments as of `add`.

        Raises:
            MissingExpertError: There is none of this name.
        """
        contents = peft_contents(expert)
        return self._take("replace", expert.name, contents, about)

    def import_peft(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        replace: bool = False,
        **about: Unpack[About],
    ) -> ExpertInfo:
        """Add a PEFT LoRA folder's two files, byte for byte.

        Args:
            folder: The folder.
            name: The expert's name; the folder's if not given.
            replace: Whether it is put in place of the one of its name, as of `replace`.
            about: As of `add`.

        Raises:
            FileNotFoundError: A file is missing.
            MissingExpertError: It is to replace one, and there is none of this name.
            ValueError: They are no expert that could be read, or as of `add`.
        """
        folder = Path(folder)
        missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} is no PEFT LoRA folder: {', '.join(missing)} missing"
            )
        contents = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
        own = name or folder.resolve().name
        return self._take("replace" if replace else "add", own, contents, about)

    def remove(self, name: str) -> None:
        """Remove an expert softly: `restore` brings it back.

        Raises:
            MissingExpertError: There is none of this name.
        """
        self._transaction.do(lambda draft: draft.remove(name), f"remove {name}")

    def restore(self, name: str, version: str | None = None) -> None:
        """Bring a removed expert back, or an older version in place of the present one.

        Args:
            name: The expert's name.
            version: One of those in `history(name)`, or under `experts/NAME/`; the last if not
                given.

        Raises:
            MissingExpertError: There was none.
            NameTakenError: It is there, and no version is named.
        """
        folder = None if version is None else self._folder(name, version)
        self._transaction.do(lambda draft: draft.restore(name, folder), f"restore {name}")

    def rename(self, old: str, new: str) -> None:
        """Give an expert another name; its files stay where they are.

        Raises:
            MissingExpertError: There is none of the old name.
            NameTakenError: There is one of the new name.
            ValueError: The new name would not do as a part of an address.
        """
        check_word("name", new)
        self._transaction.do(lambda draft: draft.rename(old, new), f"rename {old} to {new}")

    def attach(self, kind: str, values: Mapping[str, Any]) -> None:
        """Store auxiliary data of a kind for several experts, by name; as of `Auxiliary.put`."""
        for part in kind.split("/"):
            check_word("kind", part)
        draft = self._transaction.drafted()
        versions = {
            name: present(draft.heads, name, self._store.address).version for name in values
        }
        for name, version in versions.items():
            there = self._store.find(f"{AUXILIARY}/{version}", draft.index.mark)
            file = next_file(there, version, kind, values[name])
            self._transaction.stage(file, f"{kind} of {name}")

    def bring(self, files: Mapping[str, bytes]) -> None:
        """Bring files of another library, whose paths hold hashes of their contents."""
        if files:
            self._transaction.stage(files, f"{len(files)} files")

    def point(self, info: ExpertInfo, folder: str) -> None:
        """Let a free name stand for an expert of another library, whose files were brought."""
        self._catalogue.keep(info)
        self._transaction.do(
            lambda draft: draft.add(info.name, folder, "clone"), f"clone {info.name}"
        )

    def _take(
        self,
        act: str,
        name: str,
        contents: Mapping[str, bytes],
        about: About,
    ) -> ExpertInfo:
        info, written = described(contents, name, about)
        folder = f"{EXPERTS}/{name}/{info.version}"
        self._transaction.do(lambda draft: getattr(draft, act)(name, folder), f"{act} {name}")
        self._catalogue.keep(info)
        files = {f"{folder}/{file}": content for file, content in contents.items()}
        self._transaction.stage({**files, f"{folder}/{INFO}": written})
        return info

    def _folder(self, name: str, version: str) -> str:
        index = self._transaction.drafted().index
        heads = [head for head in index.heads.values() if isinstance(head, Pointer)]
        known = {path.rpartition("/")[0] for path in self._store.find(EXPERTS, index.mark)}
        own = {folder for folder in known if folder.startswith(f"{EXPERTS}/{name}/")}
        own |= {head.folder for head in heads if head.name == name}
        # A damaged history leaves what lies under the name to choose from.
        with suppress(DamagedExpertError, MissingExpertError):
            own |= {pointer.folder for pointer in self._catalogue.log.history(name)}
        found = [folder for folder in own if folder.rpartition("/")[2].startswith(version)]
        if len(found) == 1 and version:
            return found[0]
        versions = ", ".join(sorted(folder.rpartition("/")[2][:12] for folder in own)) or "none"
        raise MissingExpertError(
            f"{self._store.address}: {version!r} is no version of {name!r}; it had {versions}"
        )
