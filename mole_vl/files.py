"""Files and folders that are complete or absent."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; at the end of the block it stands as `folder`, in place of an older one.

    On an error nothing of it is left, and an older folder stays.

    Raises:
        ValueError: A file is in its place.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file, expected a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        # Temporary folders, and files that safetensors writes, are private; what is kept is not.
        partial.chmod(0o755)
        for path in partial.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _take_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, folder: Path) -> None:
    """Rename a folder over another; of two programs that do so at once, the later one's stands."""
    old = Path(f"{partial}.old")
    try:
        while True:
            with suppress(FileNotFoundError):
                folder.rename(old)
            try:
                partial.rename(folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    with suppress(OSError):
                        old.rename(folder)
                    raise
                # Another one was quicker.
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """A file to write; at the end of the block it stands as `path`, in place of an older one.

    Args:
        path: The file.
        alone: Whether there may be no older one: of several that write it at once, one succeeds.

    Raises:
        ValueError: A folder is in its place, or a file in its folder's.
        FileExistsError: There is an older one, and may not be.
    """
    standing = next(place for place in path.absolute().parents if place.exists())
    if not standing.is_dir():
        raise ValueError(f"{standing} is a file, expected a folder for {path.name}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        if alone:
            # A second name for the file: unlike a rename, it replaces nothing.
            path.hardlink_to(partial)
        else:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_file(name: str, file: Path, expected: str) -> None:
    """Raise FileNotFoundError, naming the setting, unless the file is there."""
    if not file.is_file():
        raise FileNotFoundError(f"{name}: {file} is no file, expected {expected}")


def check_output(name: str, folder: Path) -> None:
    """Raise ValueError, naming the setting, unless a folder can be made there, or written to."""
    standing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not standing.is_dir():
        raise ValueError(f"{name}: {standing} is a file, expected a folder")
    try:
        tempfile.TemporaryDirectory(prefix=".", dir=standing).cleanup()
    except OSError as error:
        raise ValueError(f"{name}: {folder} cannot be written: {error.strerror}") from error


def check_output_file(name: str, file: Path) -> None:
    """Raise ValueError, naming the setting, unless a file can be written there."""
    check_output(name, file.parent)
    if file.is_dir():
        raise ValueError(f"{name}: {file} is a folder, expected a file")


def check_replaceable(name: str, folder: Path, own: Collection[str], what: str) -> None:
    """Raise ValueError unless a folder can be written anew: it holds nothing that would be lost.

    Args:
        name: The setting, for messages.
        folder: The folder, which need not be there.
        own: Names of what may lie in it, which is replaced.
        what: What these are, for messages.
    """
    check_output(name, folder)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{name}: {folder} is where the program runs, or above it, expected a folder of its own"
        )
    strange = sorted({path.name for path in folder.glob("*")} - set(own))
    if strange:
        raise ValueError(
            f"{name}: {folder} holds {strange[0]}, which is no part of {what} and would be lost: "
            "take another folder, or move it"
        )


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, without the mark of it that some editors begin a file with.

    Raises:
        ValueError: The file is in another encoding.
    """
    return _text(file.read_bytes(), file)


def _text(content: bytes, where: str | Path) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: no UTF-8 text (at byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    # As a text file is read.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: The file holds none.
    """
    return _object(read_text(file), file)


def parse_object(content: bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object in what a file held.

    Raises:
        ValueError: It holds none.
    """
    return _object(_text(content, where), where)


def _object(text: str, where: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}, expected an object")
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def parse_tensors(content: bytes, where: str | Path) -> dict[str, Tensor]:
    """The tensors in what a safetensors file held.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"{where} is damaged or no safetensors file: {error}") from error


def read_pickled_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors by name that `torch.save` wrote; nothing else in the file is made or run.

    Raises:
        ValueError: The file is damaged, or holds anything else.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file} is damaged or holds more than tensors: {said}") from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise ValueError(f"{file} holds a {type(found).__name__}, expected tensors by name")
    return {key: value.detach() for key, value in found.items()}


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, one after the other, in hexadecimal digits."""
    return digest_contents(file.read_bytes() for file in files)


def digest_contents(contents: Iterable[bytes]) -> str:
    """What `digest` says of files with these contents."""
    state = hashlib.sha256()
    for content in contents:
        state.update(hashlib.sha256(content).digest())
    return state.hexdigest()
