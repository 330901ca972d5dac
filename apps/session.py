"""What one person at a page has: uploads, gates, pictures. Nobody else sees it."""

import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apps.shelf import Lora
from apps.stopping import Switch
from pipelines import Recording


@dataclass(frozen=True)
class Drawn:
    """The last side by side: what an export stands for."""

    loras: tuple[Lora, ...]
    gates: Path | None
    weights: Recording


class Session:
    """One open page.

    Args:
        folder: Its own, for all its files; removed with it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loras: dict[str, Lora] = {}
        self.pictures: dict[str, Path] = {}
        self.drawn: Drawn | None = None
        self.drawing, self.training = Switch(), Switch()
        # The sentences that the page wrote itself: what a person wrote stays.
        self.written: set[str] = set()
        self._gates: dict[frozenset[str], Path] = {}
        self._numbers = 0
        self._lock = threading.Lock()
        self._working = 0
        self._closed = False

    def new_path(self, name: str) -> Path:
        """A path of this session's own that nothing has yet, ending in `name`."""
        with self._lock:
            self._numbers += 1
            return self.folder / f"{self._numbers:04d}" / name

    def chosen(self, names: list[str], shelf: Mapping[str, Lora]) -> tuple[Lora, ...]:
        """The LoRAs of these names, in their order: this session's own, or the shelf's.

        Raises:
            ValueError: A name that neither has.
        """
        strange = [name for name in names if name not in self.loras and name not in shelf]
        if strange:
            raise ValueError(f"There is no LoRA {', '.join(map(repr, strange))} on this page.")
        return tuple(self.loras[n] if n in self.loras else shelf[n] for n in dict.fromkeys(names))

    def keep_gates(self, names: frozenset[str], folder: Path) -> None:
        """From now on these gates serve these LoRAs."""
        self._gates[names] = folder

    def gates_of(self, names: frozenset[str]) -> Path | None:
        """The folder of the gates for these LoRAs."""
        return self._gates.get(names)

    @contextmanager
    def working(self) -> Iterator[None]:
        """A context for work that writes: a session closed meanwhile is swept at its end."""
        with self._lock:
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
            self._sweep()

    def close(self) -> None:
        """Stop what runs, and remove all files."""
        self._closed = True
        self.drawing.stop()
        self.training.stop()
        self._sweep()

    def _sweep(self) -> None:
        with self._lock:
            if self._closed and not self._working:
                shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All open pages.

    Args:
        root: Folder of their folders, whose names nobody can guess.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, key: str | None) -> Session:
        """The session of a page, by the key that its browser was given."""
        with self._lock:
            name = key or ""
            if name not in self._open:
                self._open[name] = Session(self._root / f"page-{secrets.token_hex(16)}")
            return self._open[name]

    def close(self, key: str | None) -> None:
        """End a session."""
        with self._lock:
            session = self._open.pop(key or "", None)
        if session is not None:
            session.close()

    def __len__(self) -> int:
        return len(self._open)
