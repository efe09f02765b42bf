"""The store directories of one host, as one store: every bundle is in each of them, as far as they can be had.

A directory may be lost, full, read-only or away for a while. What needs a store takes the first that works; what became
of the others meanwhile is made up for when they are back (see `catch_up`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from zonebundle.errors import DamagedError, FullError, NoSuchBundleError, StoreError
from zonebundle.store.bundle import DELETED, MANIFEST, StoredBundle
from zonebundle.store.prune import Guard, NobodyElse
from zonebundle.store.replicate import copy_bundle
from zonebundle.store.store import Store
from zonebundle.store.tombstones import Tombstones

_log = structlog.get_logger()

# A directory that failed is tried again after so many seconds.
_PAUSE = 5.0


class Stores:
    """Opens the stores that are there, again and again; makes none. Methods block and may be called from any thread."""

    def __init__(self, directories: Sequence[Path], state_dir: Path, guard: Guard | None = None) -> None:
        self.directories = tuple(directories)
        self._guard = guard or NobodyElse()
        self._open: dict[Path, Store] = {}
        self._retired: list[tuple[int, Store]] = []
        self._failures: dict[Path, str] = {}
        self._not_before: dict[Path, float] = {}
        # Work is counted by the epoch in which it began; a new one begins when stores are taken out of use.
        self._epoch = 0
        self._working: Counter[int] = Counter()
        self._drained: set[str] = set()
        self._lock = threading.RLock()
        # One directory has nobody to disagree with: a deletion there is done, or finished by its recovery.
        self.tombstones = Tombstones([state_dir, *directories]) if len(directories) > 1 else None

    def all(self) -> list[Store]:
        """The stores that can be had now, in the order of the configuration. Use them within `working`."""
        with self._lock:
            found = (self._get(directory) for directory in self.directories)
            return [store for store in found if store is not None]

    def _get(self, directory: Path) -> Store | None:
        if self.is_drained(directory) or time.monotonic() < self._not_before.get(directory, 0.0):
            return None
        store = self._open.get(directory)
        if store is not None and directory in self._failures and not store.is_in_place():
            # Mounted anew: what we have open is another one.
            self._retire(directory)
            store = None
        try:
            store = store or Store.open(directory, self._guard, make=False)
        except StoreError as error:
            self._fail(directory, str(error))
            return None
        self._open[directory] = store
        self._failures.pop(directory, None)
        return store

    def _retire(self, directory: Path) -> None:
        self._epoch += 1
        self._retired.append((self._epoch, self._open.pop(directory)))

    def _fail(self, directory: Path, reason: str) -> None:
        self._not_before[directory] = time.monotonic() + _PAUSE
        if self._failures.get(directory) != reason:
            _log.warning("a store directory cannot be used", directory=str(directory), reason=reason)
        self._failures[directory] = reason

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While the body runs, no store that it got is closed."""
        with self._lock:
            epoch = self._epoch
            self._working[epoch] += 1
        try:
            yield
        finally:
            with self._lock:
                self._working[epoch] -= 1
                self._close_retired()

    def _is_worked_on(self, before: int) -> bool:
        return any(count for epoch, count in self._working.items() if epoch < before)

    def _close_retired(self) -> None:
        for retired in [pair for pair in self._retired if not self._is_worked_on(pair[0])]:
            self._retired.remove(retired)
            retired[1].close()

    @property
    def failures(self) -> dict[Path, str]:
        """Why the directories that are not there are not."""
        with self._lock:
            return dict(self._failures)

    def usable(self) -> list[Store]:
        """As `all`, but raises StoreError with every reason if there is none."""
        stores = self.all()
        if not stores:
            raise StoreError("; ".join(self.failures.values()) or "there is no store directory")
        return stores

    def give_up(self, store: Store, error: StoreError) -> None:
        """Leave a store that failed alone for a while. One that is full can be read, and bundles be deleted there."""
        if not isinstance(error, FullError | DamagedError):
            with self._lock:
                self._fail(store.directory, str(error))

    def find(self, zone: str, bundle_id: str) -> StoredBundle:
        """The committed bundle in the first directory that has it whole.

        Raises NoSuchBundleError if none has it, or the error of the last one that has it damaged.
        """
        missing: StoreError | NoSuchBundleError = NoSuchBundleError(zone, bundle_id)
        for store in self.usable():
            try:
                return store.find(zone, bundle_id)
            except NoSuchBundleError:
                continue
            except StoreError as error:
                missing = error
        raise missing

    def is_everywhere(self, zone: str, bundle_id: str) -> bool:
        """Whether every directory that can be had has the bundle."""
        for store in self.all():
            try:
                store.find(zone, bundle_id)
            except (NoSuchBundleError, StoreError):
                return False
        return True

    def copy(self, bundle: StoredBundle) -> str:
        """Bring a committed bundle into the other directories that can be had; returns why it is not in one of them."""
        reasons = []
        for store in self.all():
            if store.directory == bundle.directory.parents[2]:
                continue
            try:
                copy_bundle(bundle, store)
            except NoSuchBundleError:
                # Deleted meanwhile: there is nothing to copy any more.
                return ""
            except StoreError as error:
                self.give_up(store, error)
                reasons.append(f"not copied to {store.directory}: {error}")
        return "; ".join(reasons)

    def delete(self, zone: str, bundle_id: str) -> int:
        """Remove a committed bundle from every directory; returns the bytes freed.

        Directories that are away hear of it by the tombstone. Raises NoSuchBundleError, StoreError.
        """
        stores = self.usable()
        if not any(_is_there(store.bundle_directory(zone, bundle_id)) for store in stores):
            raise NoSuchBundleError(zone, bundle_id)
        return self.delete_all([(zone, bundle_id)])

    def delete_all(self, bundles: Sequence[tuple[str, str]]) -> int:
        """As `delete`, of many (zone, bundle ID) at once; those that are gone already are passed over."""
        if self.tombstones is not None:
            for _, bundle_id in bundles:
                self.tombstones.write(bundle_id)
        freed = 0
        failure: StoreError | None = None
        for store in self.usable():
            try:
                freed += store.remove_all(store.bundle_directory(zone, bundle_id) for zone, bundle_id in bundles)
            except StoreError as error:
                failure = error
        if failure is not None:
            raise failure
        for _, bundle_id in bundles:
            self._bury(bundle_id)
        return freed

    def _bury(self, bundle_id: str) -> None:
        # With every directory there and free of it, nothing can bring it back.
        if self.tombstones is not None and len(self.all()) == len(self.directories):
            self.tombstones.remove(bundle_id)

    def catch_up(self) -> tuple[int, int, list[str]]:
        """Bring every directory that can be had up to date: (bundles copied, deleted, what could not be done).

        What has a tombstone is deleted, what one lacks and another has is copied.
        """
        copied = deleted = 0
        problems: list[str] = []
        if self.tombstones is None:
            return copied, deleted, problems
        stores = self.usable()
        buried = self.tombstones.all()
        for store in stores:
            for directory in list(store.directories()):
                if directory.name in buried:
                    deleted += self._delete_buried(store, directory, problems)
        for bundle in _each(stores):
            metadata = bundle.header.metadata
            if not self.is_everywhere(metadata.zone, metadata.bundle_id):
                if reason := self.copy(bundle):
                    problems.append(reason)
                else:
                    copied += 1
        for bundle_id in buried:
            self._bury(bundle_id)
        return copied, deleted, problems

    def _delete_buried(self, store: Store, directory: Path, problems: list[str]) -> int:
        try:
            store.remove(directory)
        except NoSuchBundleError:
            return 0
        except StoreError as error:
            problems.append(str(error))
            return 0
        return 1

    def is_drained(self, directory: Path) -> bool:
        """Whether a directory lies on a path that is being drained."""
        return any(directory.is_relative_to(path) for path in self._drained)

    def drain(self, path: str) -> None:
        """Use no directory at or below `path` any more; those that are open are closed when nobody works on them."""
        with self._lock:
            for directory in [directory for directory in self._open if directory.is_relative_to(path)]:
                self._retire(directory)
            self._drained.add(path)
            self._close_retired()

    def is_in_use(self, path: str) -> bool:
        """Whether work that began before the drain of `path` goes on, on a directory below it."""
        with self._lock:
            return any(store.directory.is_relative_to(path) for _, store in self._retired)

    def undrain(self, path: str) -> None:
        """Use what is below `path` again."""
        with self._lock:
            self._drained.discard(path)
            self._not_before.clear()

    def close(self) -> None:
        """Give all directories back. Nothing may be on its way."""
        with self._lock:
            for directory in list(self._open):
                self._retire(directory)
            self._close_retired()


def _each(stores: Sequence[Store]) -> Iterator[StoredBundle]:
    """Every bundle that is whole, once."""
    for number, store in enumerate(stores):
        for bundle in store.stored():
            identity = bundle.header.metadata
            if not any(_has(earlier, identity.zone, identity.bundle_id) for earlier in stores[:number]):
                yield bundle


def _is_there(directory: Path) -> bool:
    return (directory / MANIFEST).exists() or (directory / DELETED).exists()


def _has(store: Store, zone: str, bundle_id: str) -> bool:
    try:
        store.find(zone, bundle_id)
    except (NoSuchBundleError, StoreError):
        return False
    return True
