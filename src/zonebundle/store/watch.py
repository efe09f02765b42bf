"""Whether a directory answers: a disk that hangs must cost those who need it some seconds, and not hold them for good.

A system call on such a disk does not return, and nothing can break it off. So all that may hang is done in a thread of
its own, and who waits for it stops waiting. What was left so goes on if the disk answers again; until then the
directory is *silent*.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from zonebundle.errors import SilentError
from zonebundle.store.reader import FORMAT

T = TypeVar("T")

# For what is no more than a look, and until work that lasts is wondered about.
_PATIENCE = 5.0
# For a write that is made durable: others may have given the disk much to write before.
_WRITE_PATIENCE = 15.0
# So much of a long list is fetched at a time.
_BATCH = 1000


class Do(Protocol):
    """Does something, and returns or raises what that does; SilentError if it meets a directory that is silent."""

    def __call__(self, work: Callable[[], T]) -> T: ...


class Watch:
    """Watches one directory, unless it is `alone`: where there is no other to turn to, it is waited for."""

    def __init__(self, directory: Path, *, alone: bool = False) -> None:
        self.directory = directory
        self.is_alone = alone
        self._lock = threading.Lock()
        # What nobody waits for any more.
        self._left: set[Future[object]] = set()
        self._test: Future[None] | None = None
        self._tested = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether it has not answered, and still does not."""
        return bool(self._left)

    def do(self, work: Callable[[], T]) -> T:
        """Do something in the directory; however long it takes, if only the directory answers (see Do)."""
        return do_in([self], work)

    def resolve(self, keep: Callable[[str], None]) -> None:
        """Tell `keep` where the path of the directory leads: the path alone at first, if there is no answer."""
        keep(os.path.abspath(self.directory))
        resolved: Future[None] = Future()
        begin(lambda: keep(os.path.realpath(self.directory)), resolved, self, "resolve")
        with contextlib.suppress(SilentError):
            self.look(resolved)

    def look(self, look: Future[T]) -> T:
        """Wait for what should be done at once. Raises what it raised, or SilentError."""
        if not wait([look], None if self.is_alone else _PATIENCE).done:
            self.leave(look)
            raise self.error()
        return look.result()

    def answers(self) -> bool:
        """Whether a small write becomes durable in time, now or some seconds ago."""
        with self._lock:
            now = time.monotonic()
            if self._test is None or (self._test.done() and now >= self._tested + _PATIENCE):
                self._tested = now
                self._test = Future()
                begin(self._write, self._test, self, "test")
            test, deadline = self._test, self._tested + _WRITE_PATIENCE
        if wait([test], max(0.0, deadline - now)).done:
            return True
        self.leave(test)
        return False

    def _write(self) -> None:
        # An error is an answer too.
        with contextlib.suppress(OSError):
            descriptor = os.open(self.directory / FORMAT, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.utime(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def leave(self, work: Future[T]) -> None:
        """Wait for it no more; the directory is silent until it returns."""
        left: Future[object] = work  # type: ignore[assignment]
        with self._lock:
            self._left.add(left)
        left.add_done_callback(self._came_back)

    def _came_back(self, work: Future[object]) -> None:
        with self._lock:
            self._left.discard(work)

    def error(self) -> SilentError:
        return SilentError(f"{self.directory} does not answer; look at the kernel's log, the disk, and the network")


def begin(work: Callable[[], T], done: Future[T], watch: Watch, what: str) -> None:
    """Do it in a thread, which does not keep the process from its end; here, if the directory is alone.

    What became of it is told by `done`.
    """

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    if watch.is_alone:
        run()
        return
    try:
        threading.Thread(target=run, name=f"{what} {watch.directory}", daemon=True).start()
    except RuntimeError as error:
        # Too many threads: whoever waits is to hear of it.
        done.set_exception(error)


def do_in(watches: Sequence[Watch], work: Callable[[], T]) -> T:
    """As `Watch.do`, in several directories at a time. In one that is alone, it is just done."""
    if not watches or watches[0].is_alone:
        return work()
    for watch in watches:
        if watch.is_silent:
            raise watch.error()
    done: Future[T] = Future()
    begin(work, done, watches[0], "work in")
    return wait_for(done, watches)


def in_batches(listed: Callable[[], Iterable[T]], do: Do) -> Iterator[T]:
    """Go through a long list, of which each part is fetched by `do`."""
    found = iter(do(listed))
    while batch := do(lambda: list(islice(found, _BATCH))):
        yield from batch


def wait_for(work: Future[T], watches: Sequence[Watch]) -> T:
    """Wait for work that may last, as long as the directories answer that it uses.

    Raises what it raised; SilentError if one does not answer, and then the work goes on by itself when that does.
    """
    while not wait([work], _PATIENCE).done:
        silent = [watch for watch in watches if not watch.answers()]
        if silent and not work.done():
            for watch in silent:
                watch.leave(work)
            raise silent[0].error()
    return work.result()
