"""The store directories of one host, as one store: every bundle is in each of them, as far as they can be had.

A directory may be lost, full, read-only or away for a while. What needs a store takes the first that works; what became
of the others meanwhile is made up for when they are back (see `catch_up`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from zonebundle.errors import ConflictError, DamagedError, FullError, NoSuchBundleError, StoreError
from zonebundle.store.bundle import DELETED, MANIFEST, StoredBundle
from zonebundle.store.prune import Guard, NobodyElse
from zonebundle.store.replicate import copy_bundle, has_same_bytes, is_whole_and_other
from zonebundle.store.store import Store
from zonebundle.store.tombstones import Tombstones

_log = structlog.get_logger()

# A directory that failed is tried again after so many seconds.
_PAUSE = 5.0


@dataclass(slots=True)
class _Turns:
    """Who copies a bundle, one after another; `count` is how many do, or wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0


class Stores:
    """Opens the stores that are there, again and again; makes none. Methods block and may be called from any thread."""

    def __init__(self, directories: Sequence[Path], state_dir: Path, guard: Guard | None = None) -> None:
        self.directories = tuple(directories)
        # A drain names a path without links.
        self._places = {directory: Path(os.path.realpath(directory)) for directory in directories}
        self._guard = guard or NobodyElse()
        self._open: dict[Path, Store] = {}
        self._retired: list[tuple[int, Store]] = []
        self._failures: dict[Path, str] = {}
        self._not_before: dict[Path, float] = {}
        # How often each directory may have missed something.
        self._missed: Counter[Path] = Counter()
        # Work is counted by the epoch in which it began; a new one begins when stores are taken out of use.
        self._epoch = 0
        self._working: Counter[int] = Counter()
        self._drained: set[str] = set()
        # Bundles (IDs) that are being copied, or wait for their turn to be.
        self._copies: dict[str, _Turns] = {}
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
        if store is not None and not store.is_in_place():
            # Unmounted, or mounted anew: what we have open is another one.
            self._retire(directory)
            self._close_retired()
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
        self._missed[directory] += 1
        self._retired.append((self._epoch, self._open.pop(directory)))

    def _fail(self, directory: Path, reason: str) -> None:
        self._not_before[directory] = time.monotonic() + _PAUSE
        self._missed[directory] += 1
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

    def attendance(self) -> frozenset[tuple[Path, int]]:
        """The directories that can be had, each with how often it was missed: as long as that is equal, none was."""
        with self._lock:
            return frozenset((store.directory, self._missed[store.directory]) for store in self.all())

    def usable(self) -> list[Store]:
        """As `all`, but raises StoreError with every reason if there is none."""
        stores = self.all()
        if not stores:
            drained = [f"{directory} is being drained" for directory in self.directories if self.is_drained(directory)]
            raise StoreError("; ".join([*self.failures.values(), *drained]) or "there is no store directory")
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

    def is_everywhere(self, bundle: StoredBundle) -> bool:
        """Whether every directory that can be had has the bundle, with the same manifest."""
        made = bundle.header.metadata
        for store in self.all():
            try:
                there = store.find(made.zone, made.bundle_id)
                if there.directory != bundle.directory and not has_same_bytes(there.manifest, bundle.manifest):
                    return False
            except (NoSuchBundleError, StoreError, OSError):
                return False
        return True

    def copy(self, bundle: StoredBundle) -> str:
        """Bring a committed bundle into the other directories that can be had; returns why it is not in one of them."""
        reasons = []
        for store in self.all():
            if store.directory == bundle.directory.parents[2]:
                continue
            try:
                self._copy(bundle, store)
            except NoSuchBundleError:
                # Deleted meanwhile: there is nothing to copy any more.
                return ""
            except (StoreError, ConflictError) as error:
                if isinstance(error, StoreError):
                    self.give_up(store, error)
                reasons.append(f"not copied to {store.directory}: {error}")
        return "; ".join(reasons)

    def _copy(self, bundle: StoredBundle, store: Store) -> None:
        made = bundle.header.metadata
        try:
            with self._turn(made.bundle_id):
                self._copy_or_replace(bundle, store)
                if self._is_buried(made.bundle_id):
                    # Its deletion did not find it here, and has left its tombstone for us.
                    store.delete(made.zone, made.bundle_id)
                    raise NoSuchBundleError(made.zone, made.bundle_id)
        except NoSuchBundleError:
            self._bury([made.bundle_id], _left_of([(made.zone, made.bundle_id)]))
            raise

    def _copy_or_replace(self, bundle: StoredBundle, store: Store) -> None:
        made = bundle.header.metadata
        try:
            copy_bundle(bundle, store)
        except DamagedError:
            if not is_whole_and_other(bundle, store):
                raise
            # Each was sealed while the other's directory was away. All have to be equal, and the first one is taken.
            _log.warning("a bundle was sealed twice", bundle=made.bundle_id, replaced_in=str(store.directory))
            store.delete(made.zone, made.bundle_id)
            copy_bundle(bundle, store)

    @contextlib.contextmanager
    def _turn(self, bundle_id: str) -> Iterator[None]:
        """One copy of a bundle at a time; a deletion leaves its tombstone as long as there is any."""
        with self._lock:
            turns = self._copies.setdefault(bundle_id, _Turns())
            turns.count += 1
        try:
            with turns.lock:
                yield
        finally:
            with self._lock:
                turns.count -= 1
                if not turns.count:
                    del self._copies[bundle_id]

    def _is_buried(self, bundle_id: str) -> bool:
        return self.tombstones is not None and self.tombstones.has(bundle_id)

    def delete(self, zone: str, bundle_id: str) -> int:
        """Remove a committed bundle from every directory; returns the bytes freed.

        Directories that are away hear of it by the tombstone. Raises NoSuchBundleError, StoreError.
        """
        stores = self.usable()
        is_there = any(_is_there(store.bundle_directory(zone, bundle_id)) for store in stores)
        # A directory that is away may have it, and is told by the tombstone.
        if not is_there and len(stores) == len(self.directories):
            raise NoSuchBundleError(zone, bundle_id)
        return self.delete_all([(zone, bundle_id)])

    def delete_all(self, bundles: Sequence[tuple[str, str]]) -> int:
        """As `delete`, of many (zone, bundle ID) at once; those that are gone already are passed over."""
        if self.tombstones is not None:
            for _, bundle_id in bundles:
                self.tombstones.write(bundle_id)
        freed = 0
        failure: StoreError | None = None
        stores = self.usable()
        failed = 0
        for store in stores:
            try:
                freed += store.remove_all(store.bundle_directory(zone, bundle_id) for zone, bundle_id in bundles)
            except StoreError as error:
                failure = error
                failed += 1
                self._miss(store, error)
        if failure is not None and failed == len(stores):
            raise failure
        self._bury([bundle_id for _, bundle_id in bundles], _left_of(bundles))
        return freed

    def _miss(self, store: Store, error: StoreError) -> None:
        """What was to be done in a store is made up for by the next `catch_up`; the tombstones tell what that is."""
        _log.warning("bundles could not be deleted in one directory", directory=str(store.directory), reason=str(error))
        with self._lock:
            self._missed[store.directory] += 1
        self.give_up(store, error)

    def _bury(self, bundle_ids: Collection[str], left: Callable[[Store], Collection[str]]) -> None:
        """Remove the tombstones of bundles that nothing can bring back: every directory is there, and free of them.

        `left` tells which of them a directory still has.
        """
        if self.tombstones is None:
            return
        stores = self.all()
        with self._lock:
            free = set(bundle_ids) - self._copies.keys()
        for store in stores:
            free -= set(left(store))
        # Where one has gone meanwhile, it was perhaps nothing but a mount point that had been looked into.
        if len(stores) == len(self.directories) and self.all() == stores:
            for bundle_id in free:
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
        self.tombstones.tidy()
        buried = self.tombstones.all()
        for store in stores:
            for directory in list(store.directories()):
                if directory.name in buried:
                    deleted += self._delete_buried(store, directory, problems)
        for bundle in _each(stores):
            if not self.is_everywhere(bundle) and not self._is_buried(bundle.header.metadata.bundle_id):
                if reason := self.copy(bundle):
                    problems.append(reason)
                else:
                    copied += 1
        self._bury(buried, _names)
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
        place = self._places.get(directory, directory)
        return any(place.is_relative_to(path) for path in self._drained)

    def drain(self, path: str) -> None:
        """Use no directory at or below `path` any more; those that are open are closed when nobody works on them."""
        with self._lock:
            for directory in [directory for directory in self._open if self._places[directory].is_relative_to(path)]:
                self._retire(directory)
            self._drained.add(path)
            self._close_retired()

    def is_in_use(self, path: str) -> bool:
        """Whether work that began before the drain of `path` goes on, on a directory below it."""
        with self._lock:
            return any(self._places[store.directory].is_relative_to(path) for _, store in self._retired)

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
    return os.path.lexists(directory / MANIFEST) or os.path.lexists(directory / DELETED)


def _left_of(bundles: Sequence[tuple[str, str]]) -> Callable[[Store], Collection[str]]:
    def left(store: Store) -> list[str]:
        return [bundle_id for zone, bundle_id in bundles if os.path.lexists(store.bundle_directory(zone, bundle_id))]

    return left


def _names(store: Store) -> list[str]:
    return [directory.name for directory in store.directories()]


def _has(store: Store, zone: str, bundle_id: str) -> bool:
    try:
        store.find(zone, bundle_id)
    except (NoSuchBundleError, StoreError):
        return False
    return True
