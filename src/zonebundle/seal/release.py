"""After the commit: areas that nobody reads from any more are destroyed, and the spool entry goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from zonebundle.errors import UsageError
from zonebundle.host import trace
from zonebundle.model.record import Area
from zonebundle.seal.entry import SpoolEntry, Uses

Destroy = Callable[[Area], None]


class Releaser:
    """Ends spool entries, and knows who shares an area.

    A snapshot is made by one bundle, its leader, and may be shared by others, its followers. It is in use as long as
    the spool has another entry, not sealed yet, whose record names it, or which has no record yet but is a follower or
    the leader. As only the leader's record tells its followers, its entry stays, stripped and marked as sealed, until
    the last of them is through.
    """

    def __init__(self, spool: Path, destroy: Destroy) -> None:
        """`destroy` removes an area for good; a missing one is fine. Raises SnapshotError if it is not ours."""
        self._spool = spool
        self._destroy = destroy
        # Two followers that end at the same time must not each take the other for one that still reads.
        self._lock = threading.Lock()
        # Records do not change once they are there.
        self._paths: dict[str, frozenset[str]] = {}
        self.kept: set[str] = set()

    def release(self, entry: SpoolEntry) -> None:
        """End an entry from which nothing is to be sealed any more. May be repeated at any point.

        Raises SnapshotError, OSError; then the entry is still there, for another try.
        """
        with self._lock:
            try:
                uses = entry.uses()
            except FileNotFoundError:
                # The last follower has ended it meanwhile.
                return
            self._release(entry, uses)
            for leader in {area.leader for area in uses.areas} - {entry.bundle_id}:
                self._settle(leader)

    def settle_kept(self) -> None:
        """End the leaders whose last follower has gone by itself. Raises as `release`."""
        with self._lock:
            for bundle_id in list(self.kept):
                self._settle(bundle_id)

    def _settle(self, leader: str) -> None:
        entry = SpoolEntry(self._spool, leader)
        if entry.is_sealed():
            self._release(entry, entry.uses())
        else:
            self.kept.discard(leader)

    def _release(self, entry: SpoolEntry, uses: Uses) -> None:
        is_needed = False
        for area in uses.areas:
            leads = area.leader == entry.bundle_id
            expected = uses.followers if leads else (area.leader, *self._followers(area.leader))
            if not self._is_used(area, entry.bundle_id, frozenset(expected)):
                self._destroy(area)
            elif leads:
                is_needed = True
        trace.point("seal.areas-destroyed")
        if is_needed:
            if entry.bundle_id not in self.kept:
                entry.mark_sealed()
                entry.strip()
                self.kept.add(entry.bundle_id)
            return
        entry.remove()
        self.kept.discard(entry.bundle_id)
        self._paths.pop(entry.bundle_id, None)
        trace.point("seal.spool-removed")

    def _followers(self, leader: str) -> tuple[str, ...]:
        try:
            return SpoolEntry(self._spool, leader).uses().followers
        except FileNotFoundError:
            # It has no record yet, or none any more: then its own entry, or theirs, tells that it is in use.
            return ()

    def _is_used(self, area: Area, by_other_than: str, expected: frozenset[str]) -> bool:
        for other in self._others(by_other_than):
            if other.is_sealed():
                continue
            if not other.is_recorded():
                if other.bundle_id in expected:
                    return True
            elif area.path in self._areas_of(other):
                return True
        return False

    def _others(self, bundle_id: str) -> Iterator[SpoolEntry]:
        for path in self._spool.iterdir():
            if path.name != bundle_id:
                try:
                    yield SpoolEntry(self._spool, path.name)
                except UsageError:
                    # An entry that is being removed, or nothing of ours.
                    continue

    def _areas_of(self, entry: SpoolEntry) -> frozenset[str]:
        known = self._paths.get(entry.bundle_id)
        if known is None:
            try:
                known = frozenset(area.path for area in entry.uses().areas)
            except FileNotFoundError:
                return frozenset()
            self._paths[entry.bundle_id] = known
        return known
