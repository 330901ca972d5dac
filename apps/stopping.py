"""Work in a thread of its own, that is watched and stopped from a page."""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 (no error: the way out of work that nobody wants any more)
    """Work ended because its person said so."""


class Switch:
    """Whether work is to go on: set by the page, asked by the work."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def stop(self) -> None:
        """Ask the work to end at its next step."""
        self._event.set()

    def start(self) -> None:
        """Forget that an earlier work was asked to end."""
        self._event.clear()

    def __bool__(self) -> bool:
        """Whether the work is to go on."""
        return not self._event.is_set()

    def check(self) -> None:
        """Raise `Stopped` if the work is to end."""
        if not self:
            raise Stopped


class Turn:
    """A lock whose waiters can give up: one work at a time has the models."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def take(self, waiting: Callable[[], None]) -> None:
        """Wait for the turn; `waiting` is called meanwhile, and may raise."""
        while not self._lock.acquire(timeout=0.1):
            waiting()

    def give_back(self) -> None:
        """Let the next one in."""
        self._lock.release()


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Job(Generic[T]):
    def __init__(self, work: Callable[[Callable[[T], None]], None]) -> None:
        self.news: SimpleQueue[T | _End] = SimpleQueue()
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._work(self.news.put)
        except BaseException as error:
            self.news.put(_End(error))
        else:
            self.news.put(_End(None))


def reports(work: Callable[[Callable[[T], None]], None], going: Switch) -> Iterator[T]:
    """What a work reports, as it comes; its error is raised here.

    The work runs in one thread from start to end: a page's generator is resumed by any, and the
    models' locks belong to the thread that took them. Closed early, this stops the work.

    Args:
        work: Gets a function that takes a report.
        going: Asked by the work.
    """
    job = _Job(work)
    job.thread.start()
    try:
        while not isinstance(news := job.news.get(), _End):
            yield news
        if news.error is not None:
            raise news.error
    finally:
        if job.thread.is_alive():
            going.stop()
