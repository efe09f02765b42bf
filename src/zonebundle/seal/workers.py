"""The sealer's worker threads, shared by all bundles: few chunks in memory, and every bundle gets its turn."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# One chunk being worked on and one waiting, for each worker: enough to keep it busy.
_IN_FLIGHT = 2
_PATIENCE = 5.0
GROUP = 4
"""So many adjacent chunks, at most, are one job and one segment: a quarter of the files and of the thread switches."""


class Workers:
    """Threads that compress, hash and write; all of that releases the interpreter's lock.

    At most two jobs a worker are in flight, of all bundles (but see `apart`). Who hands in a job waits for its turn,
    and turns are taken in order: as a bundle asks for one turn at a time, small bundles are not stuck behind big ones.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._slots = itertools.count()
        self._local = threading.local()
        self._turns = _Turns(_IN_FLIGHT * count)
        self._gate = _Gate()
        self._small = threading.Lock()
        # For what groups hold beyond their first chunk: as much as may be in flight besides.
        self._spare = threading.Semaphore(_IN_FLIGHT * count * (GROUP - 1))
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="seal-worker", initializer=self._begin_thread)
        self._apart: dict[Path, Workers] = {}
        self._making = threading.Lock()

    def _begin_thread(self) -> None:
        self._local.slot = next(self._slots)

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        return self._turns.waiting

    def submit(self, work: Callable[[int], T], *, alone: bool = False, last: bool = False) -> Future[T]:
        """Run `work` with its worker's number, after waiting for a turn. `alone`: while no other job runs.

        `last`: whoever else waits for a turn, or comes to, is given it before.
        """
        self._turns.take(last=last)
        try:
            future = self._threads.submit(self._run, work, alone)
        except BaseException:
            self._turns.give_back()
            raise
        future.add_done_callback(lambda _: self._turns.give_back())
        return future

    def _run(self, work: Callable[[int], T], alone: bool) -> T:
        slot: int = self._local.slot
        with self._gate.alone() if alone else self._gate.beside_others():
            return work(slot)

    @contextlib.contextmanager
    def group(self) -> Iterator[Group]:
        """Chunks that are gathered for one job."""
        group = Group(self._spare)
        try:
            yield group
        finally:
            group.clear()

    @contextlib.contextmanager
    def by_itself(self) -> Iterator[None]:
        """For many small steps that hardly ever release the interpreter's lock: the caller's thread does them.

        One thread at a time, as several would only take that lock from each other at every step: two workers beside
        the reader halve the files a second. It is not worth waiting long for, where one hangs in a file system.
        """
        is_alone = self._small.acquire(timeout=_PATIENCE)
        try:
            yield
        finally:
            if is_alone:
                self._small.release()

    def run_here(self, work: Callable[[int], T]) -> T:
        """Run `work` in the caller's thread, which then counts as a job; its number is no worker's."""
        with self._gate.beside_others():
            return work(self.count)

    def apart(self, directory: Path) -> Workers:
        """As many, for one directory alone, which may hang with them. They end with these."""
        with self._making:
            if directory not in self._apart:
                self._apart[directory] = Workers(self.count)
            return self._apart[directory]

    def close(self) -> None:
        """Wait for what runs, and end the threads."""
        for workers in self._apart.values():
            workers.close()
        self._threads.shutdown(wait=True)


class Group:
    """Chunks of one log that are read and not handed in yet, at most GROUP.

    Many bundles gather at a time: who finds the memory for it taken has groups of one.
    """

    def __init__(self, spare: threading.Semaphore) -> None:
        self._spare = spare
        self._taken = 0
        self.chunks: list[bytes] = []

    def make_room(self) -> bool:
        """Whether a chunk may be added before those that are there are handed in."""
        if not self.chunks:
            return True
        if len(self.chunks) == GROUP or not self._spare.acquire(blocking=False):
            return False
        self._taken += 1
        return True

    def clear(self) -> None:
        """They are handed in, or given up."""
        self.chunks = []
        for _ in range(self._taken):
            self._spare.release()
        self._taken = 0


class _Turns:
    """A semaphore that is handed on in the order of asking: threading.Semaphore lets a fast thread barge in.

    Those who asked to be last are given what nobody else waits for.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: deque[threading.Lock] = deque()
        self._last: deque[threading.Lock] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._last)

    def take(self, *, last: bool = False) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            (self._last if last else self._waiting).append(turn)
        turn.acquire()

    def give_back(self) -> None:
        with self._lock:
            if waiting := self._waiting or self._last:
                waiting.popleft().release()
            else:
                self._free += 1


class _Gate:
    """Lets many jobs run beside each other, or one alone; one that wants to be alone is not overtaken."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._wanting = 0
        self._is_alone = False

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not (self._is_alone or self._wanting))
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                if self._wanting:
                    self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._wanting += 1
            self._changed.wait_for(lambda: not (self._is_alone or self._running))
            self._wanting -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._changed.notify_all()
