"""How a change comes about: thought out, written, and thought out anew if others were quicker."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from mole_vl.library.catalogue import Catalogue
from mole_vl.library.draft import Draft, UnsettledError
from mole_vl.library.errors import ContendedError, DamagedExpertError, TakenError
from mole_vl.library.pointers import Pointer, commit_path, fate_contents
from mole_vl.library.readme import readme
from mole_vl.library.stores import Change

_TRIES = 30
_FOLLOWED = 5
# How long a change of several names that is under way is waited for before it is ended: longer
# than its writer, if alive, takes between two files.
PATIENCE = 2.0


class Transaction:
    """Operations on a draft, and the files that they bring.

    Args:
        catalogue: The library's.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue, self._store = catalogue, catalogue.store
        self._operations: list[Callable[[Draft], None]] = []
        self._told: list[str] = []
        self._staged: list[Any] = []
        self._draft: Draft | None = None

    def do(self, operation: Callable[[Draft], None], what: str) -> None:
        """Apply an operation to the draft, now and whenever that is begun anew.

        Raises:
            Exception: What the operation raises; it is not tried again then.
        """
        # The others first: what they raise is not this one's.
        self.drafted()
        self._operations.append(operation)
        try:
            self._apply(operation)
        except BaseException:
            self._operations.pop()
            self._draft = None
            raise
        self._told.append(what)

    def stage(self, files: Mapping[str, bytes], what: str | None = None) -> None:
        """Bring files whose paths hold hashes of their contents."""
        self._staged += self._store.stage(files)
        self._told += [what] if what else []

    def drafted(self) -> Draft:
        """The draft with all operations so far, begun anew where there is none."""
        while self._draft is None:
            draft = Draft(self._catalogue.log.read(), self._store.address)
            try:
                for operation in self._operations:
                    operation(draft)
            except UnsettledError as other:
                self._settle(other.commits)
            else:
                self._draft = draft
        return self._draft

    def commit(self, message: str | None) -> None:
        """Make the operations count, all of them or none.

        Raises:
            ContendedError: Others were quicker at every try.
            ValueError: What an operation says of the library as others have changed it.
        """
        for attempt in range(_TRIES if self._told else 0):
            draft = self.drafted()
            created = draft.created(whole=self._store.whole)
            change = Change(
                message=message or "; ".join(self._told),
                staged=self._staged,
                created=created,
                readme=self._readme(draft.heads, draft.index.mark),
            )
            try:
                self._store.commit(change, draft.index.mark)
            except TakenError:
                time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
                self._draft = None
            else:
                self._follow(draft.index.files | created.keys())
                return
        if self._told:
            raise ContendedError(
                f"{self._store.address}: other writers were quicker {_TRIES} times; nothing of "
                f"'{'; '.join(self._told)}' was done: try again when fewer write"
            )

    def _apply(self, operation: Callable[[Draft], None]) -> None:
        try:
            operation(self.drafted())
        except UnsettledError as other:
            self._settle(other.commits)
            self._draft = None
            self.drafted()

    def _settle(self, commits: frozenset[str]) -> None:
        """Wait for other writers' changes of several names; end those that do not come about."""
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            commits &= frozenset().union(*self._catalogue.log.read().open.values())
            if not commits:
                return
            time.sleep(PATIENCE / 20)
        self._store.ensure({commit_path(commit): fate_contents(commit, []) for commit in commits})

    def _follow(self, seen: frozenset[str]) -> None:
        """Write the list anew as long as others have changed what it was derived from."""
        for _ in range(0 if self._store.whole else _FOLLOWED):
            index = self._catalogue.log.read()
            if index.files == seen:
                return
            self._store.derive(self._readme(index.heads, index.mark))
            seen = index.files

    def _readme(self, heads: Mapping[str, Pointer | DamagedExpertError], mark: str | None) -> bytes:
        there = [
            head for head in heads.values() if isinstance(head, DamagedExpertError) or head.present
        ]
        return readme(self._catalogue.infos(there, mark))
