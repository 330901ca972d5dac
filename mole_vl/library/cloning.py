"""A library's experts copied to another address."""

from collections.abc import Iterable, Mapping

from mole_vl.library.auxiliary_files import AUXILIARY, latest_files, read_value, with_entry
from mole_vl.library.batch import Batch
from mole_vl.library.catalogue import EXPERTS, Catalogue, present
from mole_vl.library.errors import DamagedExpertError, NameTakenError
from mole_vl.library.info import INFO, ExpertInfo
from mole_vl.library.log import Index
from mole_vl.library.seals import sha256
from mole_vl.library.weights import StoredExpert


def clone(source: Catalogue, target: Catalogue, names: Iterable[str] | None) -> None:
    """Copy experts and their auxiliary data; one change of the target.

    Raises:
        MissingExpertError: There is no expert of a name.
        DamagedExpertError: An expert or its data are damaged.
        NameTakenError: The target has another expert or version of a name.
    """
    index, there = source.log.read(), target.log.read()
    infos = sound(source, index, names)
    _check_clashes(target, there, infos)
    data = latest_files(source.store.find(AUXILIARY, index.mark))
    # What a clone that was broken off has brought need not be read again.
    brought = target.store.find(EXPERTS, there.mark)
    entered = set(latest_files(target.store.find(AUXILIARY, there.mark)).values())
    with Batch(target, f"clone of {source.store.address}") as batch:
        for name, info in infos.items():
            attached = {path for (version, _), path in data.items() if version == info.version}
            batch.bring(_data(source, index, name, attached - entered))
            if name not in there.present():
                folder = f"{EXPERTS}/{name}/{info.version}"
                if f"{folder}/{INFO}" not in brought:
                    batch.bring(_files(source, index, info, folder))
                batch.point(info, folder)


def sound(source: Catalogue, index: Index, names: Iterable[str] | None) -> dict[str, ExpertInfo]:
    """What is known of these experts or all, none of whose pointers and `expert.json` is damaged.

    Raises:
        MissingExpertError: There is no expert of a name.
        DamagedExpertError: One of them is damaged there.
    """
    wanted = index.present() if names is None else names
    heads = [present(index.heads, name, source.store.address) for name in wanted]
    infos = source.infos(heads, index.mark)
    for info in infos.values():
        if isinstance(info, DamagedExpertError):
            raise info
    return {name: info for name, info in infos.items() if isinstance(info, ExpertInfo)}


def _check_clashes(target: Catalogue, there: Index, infos: Mapping[str, ExpertInfo]) -> None:
    own = {name: there.heads[name] for name in there.present() if name in infos}
    for head in own.values():
        if isinstance(head, DamagedExpertError):
            raise head
    clashes = [
        name
        for name, head in own.items()
        if not isinstance(head, DamagedExpertError) and head.version != infos[name].version
    ]
    if clashes:
        raise NameTakenError(
            f"{target.store.address} has other experts, or other versions, of the names "
            f"{', '.join(clashes)}: nothing was copied; rename or remove them, or name the "
            "rest alone"
        )


def _files(source: Catalogue, index: Index, info: ExpertInfo, folder: str) -> dict[str, bytes]:
    """An expert's files by their paths in the target; `expert.json` last."""
    head = present(index.heads, info.name, source.store.address)
    contents = StoredExpert(info, source, head.folder, index.mark, None).contents()
    path = f"{head.folder}/{INFO}"
    said = source.store.read([path], index.mark).get(path, b"")
    if sha256(said) != info.version:
        raise source.damage(info.name, f"{path} was changed or removed")
    return {f"{folder}/{file}": content for file, content in {**contents, INFO: said}.items()}


def _data(source: Catalogue, index: Index, name: str, paths: Iterable[str]) -> dict[str, bytes]:
    wanted = list(paths)
    contents = source.store.read(wanted, index.mark)
    files: dict[str, bytes] = {}
    for path in wanted:
        try:
            read_value(contents.get(path), path)
        except ValueError as error:
            raise source.damage(name, str(error)) from error
        files |= with_entry(path, contents[path])
    return files
