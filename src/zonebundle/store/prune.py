"""Removal of segments that nobody uses any more, in two phases that are safe at every crash point.

    nobody refers to it → the index forgets it, durably → moved to segments/pruned/
    → the holds that were on their way then have a record, or are gone → put back what a record uses → removed

A hold asks the index without asking us, and notes in its record what it was told: a record that comes within the two
phases may refer to a segment that was forgotten just after the hold had looked. What is in `pruned/` after a crash goes
through the second phase again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from zonebundle.host import trace
from zonebundle.store.objects import SegmentStore

# A hold notes in its record what the index tells it within its budget and the patience for a slow disk. An intent that
# has no record after so many seconds is of a stop with a long grace, which will ask later, or of one never recorded.
_LONGEST = 900.0

Referenced = Callable[[frozenset[str]], set[str]]
"""Which of the segments given (hex digests) the bundles of the store refer to."""


class Guard(Protocol):
    """Who else uses segments, and leads others to them. Where a method raises StoreError, nothing is removed."""

    def used(self, digests: frozenset[str]) -> set[str]:
        """Those of the segments that a capture record or a claim of seal-ahead needs."""

    def forget(self, digests: Collection[str]) -> None:
        """Durably lead nobody to these segments any more."""

    def open_holds(self) -> frozenset[str]:
        """The holds that have not made their record durable yet."""


class NobodyElse:
    """The guard of a store on its own: only its bundles use segments."""

    def used(self, digests: frozenset[str]) -> set[str]:
        return set()

    def forget(self, digests: Collection[str]) -> None:
        return

    def open_holds(self) -> frozenset[str]:
        return frozenset()


class Pruner:
    """Removes segments of one store. Its methods block, and may be called from any thread."""

    def __init__(self, segments: SegmentStore, referenced: Referenced, guard: Guard) -> None:
        self._segments = segments
        self._referenced = referenced
        self._guard = guard
        self._lock = threading.Lock()
        # What was set aside, the holds that may have been told of it, and when (monotonic).
        self._waiting: list[tuple[frozenset[str], set[str], float]] = []
        # A removal failed, and has perhaps set something aside before.
        self._has_failed = False

    def recover(self) -> None:
        """Take over what an earlier writer had set aside."""
        if aside := frozenset(self._segments.aside()):
            used = self._referenced(aside)
            self._segments.put_back(used)
            self._waiting.append((self._guard.open_holds(), set(aside - used), time.monotonic()))

    @property
    def is_waiting(self) -> bool:
        """Whether something is aside, and `finish` has to be called again."""
        return self._has_failed or bool(self._waiting)

    def prune(self, candidates: Iterable[str]) -> int:
        """Remove those of `candidates` that nobody uses; returns the bytes that were freed now.

        Raises StoreError, OSError; what was removed till then stays removed.
        """
        try:
            moved = self._segments.set_aside(candidates, self._choose)
        except BaseException:
            self._has_failed = True
            raise
        trace.point("prune.moved")
        if moved:
            with self._lock:
                self._waiting.append((self._guard.open_holds(), moved, time.monotonic()))
        return self.finish()

    def _choose(self, candidates: frozenset[str]) -> set[str]:
        unused = candidates - self._referenced(candidates)
        unused -= self._guard.used(unused) if unused else set()
        if unused:
            self._guard.forget(unused)
            trace.point("prune.forgotten")
        return set(unused)

    def finish(self) -> int:
        """The second phase, for all that no hold can have been told of any more; returns the bytes freed."""
        freed = 0
        with self._lock:
            holds = self._guard.open_holds()
            if self._has_failed:
                self._waiting.append((holds, set(self._segments.aside()), time.monotonic()))
                self._has_failed = False
            for batch in list(self._waiting):
                told, digests, since = batch
                if told & holds and time.monotonic() - since < _LONGEST:
                    continue
                # A bundle that came to need one since has put it, or its lease has put it back.
                used = self._guard.used(frozenset(digests))
                self._segments.put_back(used)
                freed += self._segments.drop_aside(digests - used)
                self._waiting.remove(batch)
                trace.point("prune.removed")
        return freed
