"""A repository of the Hugging Face Hub as a store: a change is one commit on the one it saw."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from mole_vl.library.errors import TakenError
from mole_vl.library.stores import AT_ONCE, README, Change, Store

# The Hub's answers to a commit whose parent is not the last one any more.
_OVERTAKEN = (409, 412)


def open_hub(uri: str, rest: str, token: str | None, options: Mapping[str, Any]) -> "HubStore":
    """The store at `hf://USER/REPO`.

    Args:
        uri: The address.
        rest: What follows `hf://`.
        token: The Hub's token; the one that is logged in with if not given.
        options: `endpoint`, another Hub's; `private`, whether a repository that is begun is.

    Raises:
        ValueError: The address or an option is none of these.
    """
    repo = rest.strip("/")
    if repo.count("/") != 1:
        raise ValueError(f"{uri!r} names no repository, expected hf://USER/REPO")
    strange = options.keys() - {"endpoint", "private"}
    if strange:
        raise ValueError(
            f"{uri}: options {', '.join(sorted(strange))} are unknown, expected endpoint, private"
        )
    api = HfApi(endpoint=options.get("endpoint"), token=token)
    return HubStore(uri, repo, api, private=options.get("private", True))


class HubStore(Store):
    """A repository of models.

    Args:
        address: As the library was opened.
        repo: USER/REPO.
        api: The Hub's client.
        private: Whether the repository is to be private if it is begun here.
    """

    whole = True

    def __init__(self, address: str, repo: str, api: HfApi, *, private: bool) -> None:
        self.address, self.repo, self.api, self.private = address, repo, api, private
        self._tree: tuple[str, dict[str, int]] | None = None

    def mark(self) -> str | None:
        """The last commit; None where there is no repository, or none that the token may see."""
        try:
            return self.api.repo_info(self.repo).sha
        except RepositoryNotFoundError:
            return None

    def find(self, folder: str, mark: str | None) -> dict[str, int]:
        """As of `Store`; a commit's files are listed once."""
        if mark is None:
            return {}
        if self._tree is None or self._tree[0] != mark:
            entries = self.api.list_repo_tree(self.repo, recursive=True, revision=mark)
            files = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
            self._tree = mark, files
        start = folder.rstrip("/") + "/"
        return {path: size for path, size in self._tree[1].items() if path.startswith(start)}

    def read(self, paths: Iterable[str], mark: str | None) -> dict[str, bytes]:
        """As of `Store`, several at once."""
        wanted = list(paths)
        if mark is None or not wanted:
            return {}
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            ThreadPoolExecutor(AT_ONCE) as threads,
        ):
            found = list(threads.map(lambda path: self._content(path, mark, folder), wanted))
        return {
            path: content
            for path, content in zip(wanted, found, strict=True)
            if content is not None
        }

    def local(self, folder: str) -> Path | None:
        """Nothing of it is on this machine's disk."""
        return None

    def stage(self, files: Mapping[str, bytes]) -> Sequence[CommitOperationAdd]:
        """Large files are uploaded at once, and not kept in memory till the commit."""
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        self.api.preupload_lfs_files(self.repo, additions)
        return additions

    def commit(self, change: Change, mark: str | None) -> None:
        """One commit, on the one that was seen."""
        created = {**change.created, README: change.readme}
        self._send([*change.staged, *_additions(created)], change.message, mark)

    def ensure(self, created: Mapping[str, bytes]) -> None:
        """As of `Store`; the repository is begun too."""
        self.api.create_repo(self.repo, private=self.private, exist_ok=True)
        for path, content in created.items():
            mark = self.mark()
            while not self.read([path], mark):
                try:
                    self._send(_additions({path: content}), f"begin {path}", mark)
                except TakenError:
                    mark = self.mark()
                else:
                    break

    def derive(self, readme: bytes) -> None:
        """A commit of the list alone."""
        self._send(_additions({README: readme}), "list of experts", None)

    def _content(self, path: str, mark: str, folder: str) -> bytes | None:
        # The Hub's own cache would keep a second copy of each file.
        try:
            file = self.api.hf_hub_download(self.repo, path, revision=mark, local_dir=folder)
        except EntryNotFoundError:
            return None
        return Path(file).read_bytes()

    def _send(
        self, additions: Sequence[CommitOperationAdd], message: str, mark: str | None
    ) -> None:
        # The Hub shows a first line, and refuses a long one.
        title = message if len(message) < 100 else f"{message[:97]}..."
        try:
            self.api.create_commit(self.repo, additions, commit_message=title, parent_commit=mark)
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in _OVERTAKEN:
                raise TakenError(str(error)) from error
            raise


def _additions(files: Mapping[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content) for path, content in files.items()]
