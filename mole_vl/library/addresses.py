"""Addresses of libraries, translated into file systems."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from mole_vl.library.disk import Disk, Memory
from mole_vl.library.file_store import FileStore
from mole_vl.library.stores import Store

# What fsspec's file systems say of themselves: "create" is for one writer alone.
_EXCLUSIVE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
_EXTRAS = {
    "hf": ("huggingface_hub", "hub"), "az": ("adlfs", "azure"), "abfs": ("adlfs", "azure"),
    "abfss": ("adlfs", "azure"), "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"),
}  # fmt: skip


@dataclass(frozen=True)
class Access:
    """How a store is reached.

    Args:
        token: The credential.
        options: Further arguments of the file system.
    """

    token: str | None
    options: Mapping[str, Any]


def open_store(uri: str, token: str | None, options: Mapping[str, Any] | None) -> Store:
    """The store at an address.

    Args:
        uri: The address.
        token: The credential, for the stores that take one.
        options: Further arguments of the file system.

    Raises:
        ValueError: It is no address, or not one of this kind of store.
        FileNotFoundError: It is in an archive that cannot be opened.
        ModuleNotFoundError: The store needs an extra that is not installed.
    """
    scheme, colon, rest = uri.partition("://")
    if not colon:
        scheme, rest = "local", uri
    if not rest.strip("/") and scheme not in ("local", "file"):
        raise ValueError(f"{uri!r} names no place, expected such as {scheme}://PLACE")
    _check_extra(uri, scheme)
    return _TRANSLATORS.get(scheme, _other)(uri, rest, Access(token, options or {}))


def cache_folder() -> Path:
    """Where experts of other machines are kept: MOLE_VL_CACHE, or under the user's cache."""
    own = os.environ.get("MOLE_VL_CACHE")
    general = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(general or Path.home() / ".cache") / "mole_vl"


def _local(uri: str, rest: str, access: Access) -> Store:
    _refuse_credential(uri, access, "a disk asks for none")
    if not rest:
        raise ValueError(f"{uri!r} names no folder")
    folder = Path(rest).expanduser().absolute()
    # What may not be looked into, whoever reads it tells.
    with suppress(OSError):
        standing = next(place for place in (folder, *folder.parents) if place.exists())
        if not standing.is_dir():
            raise ValueError(f"{uri}: {standing} is a file, expected the folder of a library")
    return FileStore(uri, Disk(**access.options), str(folder))


def _virtual(uri: str, rest: str, access: Access) -> Store:
    _refuse_credential(uri, access, "memory asks for none")
    return FileStore(uri, Memory(**access.options), "/" + rest.strip("/"))


def _azure(uri: str, rest: str, access: Access) -> Store:
    """`az://ACCOUNT/CONTAINER`, and a folder in it; adlfs's own form is `abfs://CONTAINER`."""
    account, _, place = rest.strip("/").partition("/")
    if not place:
        raise ValueError(f"{uri!r} names no container, expected az://ACCOUNT/CONTAINER")
    given = {"account_name": account, **_azure_credential(access.token), **access.options}
    return _fsspec(uri, f"abfs://{place}", given, exclusive=True)


def _azure_credential(token: str | None) -> dict[str, Any]:
    if token is None:
        return {}
    # A connection string has its own names for its parts, a SAS is a query.
    return {"connection_string" if "AccountName=" in token else "sas_token": token}


def _hub(uri: str, rest: str, access: Access) -> Store:
    return import_module("mole_vl.library.hub").open_hub(uri, rest, access.token, access.options)


def _google(uri: str, rest: str, access: Access) -> Store:
    given = {} if access.token is None else {"token": access.token}
    return _fsspec(uri, f"gs://{rest}", {**given, **access.options}, exclusive=True)


def _other(uri: str, rest: str, access: Access) -> Store:
    scheme = uri.partition("://")[0]
    _refuse_credential(uri, access, "name the credential as fsspec does, in options=")
    return _fsspec(uri, uri, access.options, exclusive=scheme in _EXCLUSIVE)


def _fsspec(uri: str, url: str, options: Mapping[str, Any], *, exclusive: bool) -> Store:
    # A kept listing would hide what others have written since.
    try:
        files, root = url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise ModuleNotFoundError(f"{uri}: {error}") from error
    except OSError as error:
        raise FileNotFoundError(f"{uri} cannot be opened: {error}") from error
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from error
    return FileStore(uri, files, root, exclusive)


def _check_extra(uri: str, scheme: str) -> None:
    package, extra = _EXTRAS.get(scheme, ("fsspec", "library"))
    if not find_spec(package):
        raise ModuleNotFoundError(
            f"{uri} needs {package}, which is not installed: pip install 'mole-vl[{extra}]'"
        )


def _refuse_credential(uri: str, access: Access, why: str) -> None:
    if access.token is not None:
        raise ValueError(f"{uri} takes no token: {why}")


_TRANSLATORS: dict[str, Callable[[str, str, Access], Store]] = {
    "local": _local, "file": _local, "virtual": _virtual, "az": _azure, "hf": _hub,
    "gs": _google, "gcs": _google,
}  # fmt: skip
