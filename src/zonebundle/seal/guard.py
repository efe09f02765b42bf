"""What stands between a segment and its removal besides the bundles: capture records, holds, claims, the index."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from zonebundle.errors import StoreError
from zonebundle.model.record import INTENT_FILE
from zonebundle.seal.entry import SpoolEntry
from zonebundle.store.failure import store_errors
from zonebundle.store.index import Index
from zonebundle.store.reader import is_bundle_id


class SpoolGuard:
    """The guard of the stores (see store.prune) on the part of one spool and its index."""

    def __init__(self, spool: Path, index: Callable[[], Index | None]) -> None:
        """`index` returns None as long as there is none that could be asked: nothing is removed then."""
        self._spool = spool
        self._index = index

    def used(self, digests: frozenset[str]) -> set[str]:
        """Those of the segments that a record in the spool names, or that seal-ahead keeps for a living zone."""
        used = self._opened().claimed(digests)
        for entry in self._entries():
            if entry.is_recorded() and not entry.is_sealed():
                with store_errors(f"reading {entry.path}"):
                    used |= digests & entry.segments()
        return used

    def forget(self, digests: Collection[str]) -> None:
        """Have the index lead nobody there any more, durably."""
        self._opened().forget(digests)

    def open_holds(self) -> frozenset[str]:
        """The bundles with an intent and no record: their holds may have asked the index before it forgot."""
        return frozenset(
            entry.bundle_id
            for entry in self._entries()
            if not entry.is_recorded() and (entry.path / INTENT_FILE).exists()
        )

    def _opened(self) -> Index:
        index = self._index()
        if index is None:
            raise StoreError("the index is not open yet: segments are removed when it is")
        return index

    def _entries(self) -> Iterator[SpoolEntry]:
        with store_errors(f"listing {self._spool}"):
            names = [path.name for path in self._spool.iterdir()]
        return (SpoolEntry(self._spool, name) for name in names if is_bundle_id(name))
