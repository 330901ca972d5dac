"""Files of auxiliary data: `auxiliary/VERSION/KIND/NUMBER-SHA256`, tensors or JSON.

Each has an entry beside it, written last, so that one of the two tells if the other is gone. Two
writers' files of one number both stay; the greater hash is the later one then, for everybody.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mole_vl.files import parse_tensors
from mole_vl.library.seals import sealed, sha256, unsealed

AUXILIARY = "auxiliary"
_FILE = re.compile(
    rf"{AUXILIARY}/(?P<version>[0-9a-f]{{64}})/(?P<kind>.+)/"
    r"(?P<number>\d{6})-(?P<sha256>[0-9a-f]{64})\.(?P<form>safetensors|json)"
)
_ENTRY = ".entry"


def next_file(paths: Iterable[str], version: str, kind: str, value: Any) -> dict[str, bytes]:
    """The file that holds a value, the next of its kind beside those there are, and its entry."""
    tensors = isinstance(value, Mapping) and {isinstance(part, Tensor) for part in value.values()}
    if tensors == {True}:
        # Tensors that share memory, safetensors refuses.
        content = save(
            {key: part.detach().cpu().contiguous().clone() for key, part in value.items()}
        )
    else:
        content = sealed({"value": value})
    taken = [
        int(found["number"])
        for path in paths
        if (found := _FILE.fullmatch(path)) and (found["version"], found["kind"]) == (version, kind)
    ]
    form = "safetensors" if tensors == {True} else "json"
    stem = f"{max(taken, default=0) + 1:06d}-{sha256(content)}"
    return with_entry(f"{AUXILIARY}/{version}/{kind}/{stem}.{form}", content)


def with_entry(path: str, content: bytes) -> dict[str, bytes]:
    """A file and its entry, which is to be written after it."""
    return {path: content, f"{path}{_ENTRY}": sealed({"file": path})}


def latest_files(paths: Iterable[str]) -> dict[tuple[str, str], str]:
    """The last file of each version and kind, by its entry: the file itself may be gone."""
    entered = (path.removesuffix(_ENTRY) for path in sorted(paths) if path.endswith(_ENTRY))
    found = (match for path in entered if (match := _FILE.fullmatch(path)))
    return {(match["version"], match["kind"]): match[0] for match in found}


def faults_of_data(contents: Mapping[str, bytes]) -> list[str]:
    """What is wrong with files of auxiliary data and their entries, by all their contents."""
    faults = []
    for path in sorted({path.removesuffix(_ENTRY) for path in contents}):
        entry = f"{path}{_ENTRY}"
        try:
            read_value(contents.get(path), path)
            if entry not in contents:
                raise ValueError(f"{entry} is missing: its data do not count")
            if unsealed(contents[entry], entry) != {"file": path}:
                raise ValueError(f"{entry} is another file's")
        except ValueError as error:
            faults.append(str(error))
    return faults


def read_value(content: bytes | None, path: str) -> Any:
    """The value in a file.

    Raises:
        ValueError: It is missing, not as it was written, or no file of auxiliary data.
    """
    found = _FILE.fullmatch(path)
    if found is None:
        raise ValueError(f"{path} is no name that a library gives: remove it")
    if content is None:
        raise ValueError(f"{path} is missing")
    if sha256(content) != found["sha256"]:
        raise ValueError(f"{path} has SHA-256 {sha256(content)}, expected what its name says")
    if found["form"] == "safetensors":
        return parse_tensors(content, path)
    return unsealed(content, path)["value"]
