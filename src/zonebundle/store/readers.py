"""Reading several store directories as one: each bundle from the first that has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from zonebundle.errors import NoSuchBundleError, StoreError
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.reader import Debris, StoreReader
from zonebundle.store.tombstones import Tombstones
from zonebundle.store.watch import Watch, in_batches

T = TypeVar("T")
_log = structlog.get_logger()


class StoreReaders:
    """The bundles of several store directories, of which any may be lost or away, or hang."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = tuple(directories)
        self._watches = {one: Watch(one, alone=len(self.directories) == 1) for one in self.directories}

        def reach(root: Path, work: Callable[[], T]) -> T:
            return self._watches[root].do(work)

        # A directory that could not be written when a bundle was deleted still has it.
        self._tombstones = Tombstones(self.directories, reach) if len(self.directories) > 1 else None

    def _readers(self) -> Iterator[StoreReader]:
        failure: StoreError | None = None
        count = 0
        for directory in self.directories:
            try:
                yield self._watches[directory].do(partial(StoreReader.open, directory))
                count += 1
            except StoreError as error:
                failure = failure or error
        if failure is not None and not count:
            raise failure

    def stored(self) -> Iterator[StoredBundle]:
        """Every bundle, once, in no order, but for deleted ones. One damaged everywhere is left out and logged."""
        seen = self._tombstones.all() if self._tombstones is not None else set()
        for reader in self._readers():
            try:
                for bundle in in_batches(reader.stored, self._watches[reader.directory].do):
                    if (bundle_id := bundle.header.metadata.bundle_id) not in seen:
                        seen.add(bundle_id)
                        yield bundle
            except StoreError as error:
                # The others may have what this one cannot even list.
                _log.error("a store directory cannot be read", directory=str(reader.directory), reason=str(error))

    def debris(self) -> Iterator[Debris]:
        """What cannot be read as a bundle in any directory, but can be deleted like one."""
        for reader in self._readers():
            try:
                for debris in in_batches(reader.debris, self._watches[reader.directory].do):
                    if not self._is_whole(debris):
                        yield debris
            except StoreError as error:
                _log.error("a store directory cannot be read", directory=str(reader.directory), reason=str(error))

    def _is_whole(self, debris: Debris) -> bool:
        try:
            self.find(debris.zone, debris.bundle_id)
        except (NoSuchBundleError, StoreError):
            return False
        return True

    def find(self, zone: str, bundle_id: str, avoids: Callable[[Path], bool] = lambda directory: False) -> StoredBundle:
        """The committed bundle from the first directory that has it whole; those that are avoided come last.

        Raises NoSuchBundleError, UsageError (no UUID), or the error of a directory that has it damaged.
        """
        if self._tombstones is not None and self._tombstones.has(bundle_id):
            raise NoSuchBundleError(zone, bundle_id)
        failure: StoreError | None = None
        for reader in sorted(self._readers(), key=lambda reader: avoids(reader.directory)):
            try:
                return self._watches[reader.directory].do(partial(reader.find, zone, bundle_id))
            except NoSuchBundleError:
                continue
            except StoreError as error:
                failure = error
        raise failure or NoSuchBundleError(zone, bundle_id)
