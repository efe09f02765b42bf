"""The store directories of one host, as one store: every bundle is in each of them, as far as they can be had.

A directory may be lost, full, read-only or away for a while. What needs a store takes the first that works; what became
of the others meanwhile is made up for when they are back (see `catch_up`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from zonebundle.errors import ConflictError, DamagedError, NoSuchBundleError, SilentError, StoreError
from zonebundle.store.bundle import DELETED, MANIFEST, StoredBundle
from zonebundle.store.open_stores import OpenStores
from zonebundle.store.prune import Guard
from zonebundle.store.replicate import copy_bundle, has_same_bytes, is_whole_and_other
from zonebundle.store.store import Store
from zonebundle.store.tombstones import Tombstones

T = TypeVar("T")
_log = structlog.get_logger()

_TURN_PATIENCE = 5.0


@dataclass(slots=True)
class _Turns:
    """Who copies a bundle, one after another; `count` is how many do, or wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0


class Stores(OpenStores):
    """The stores that are there, and what has to be done in all of them. Methods block, and may be called from any
    thread; what they do in a directory that hangs is given up after some seconds, as if that had failed.
    """

    def __init__(self, directories: Sequence[Path], state_dir: Path, guard: Guard | None = None) -> None:
        super().__init__(directories, guard)
        # Copies of a bundle (ID) to a directory that are being made, or wait for their turn to be.
        self._copies: dict[tuple[str, Path], _Turns] = {}

        def reach(root: Path, work: Callable[[], T]) -> T:
            return work() if root == state_dir else self.at(root, work)

        # One directory has nobody to disagree with: a deletion there is done, or finished by its recovery.
        self.tombstones = Tombstones([state_dir, *directories], reach) if len(directories) > 1 else None

    def find(self, zone: str, bundle_id: str) -> StoredBundle:
        """The committed bundle in the first directory that has it whole.

        Raises NoSuchBundleError if none has it, or the error of the last one that has it damaged.
        """
        missing: StoreError | NoSuchBundleError = NoSuchBundleError(zone, bundle_id)
        for store in self.usable():
            try:
                return self.on(store, partial(store.find, zone, bundle_id))
            except NoSuchBundleError:
                continue
            except StoreError as error:
                missing = error
        raise missing

    def is_everywhere(self, bundle: StoredBundle) -> bool:
        """Whether every directory that can be had has the bundle, with the same manifest."""
        stores = self.all()
        source = self._source(bundle, stores)
        try:
            # Without its source nobody would notice that it hangs.
            return len(source) > 0 and all(
                self.on_all(store, source, partial(_has_same, store, bundle)) for store in stores
            )
        except (NoSuchBundleError, StoreError, OSError):
            return False

    def copy(self, bundle: StoredBundle) -> str:
        """Bring a committed bundle into the other directories that can be had; returns why it is not in one of them."""
        reasons = []
        stores = self.all()
        source = self._source(bundle, stores)
        if not source:
            return f"not copied: {bundle.directory} cannot be had now"
        for store in stores:
            if store in source:
                continue
            try:
                self.on_all(store, source, partial(self._copy, bundle, store))
            except NoSuchBundleError:
                # Deleted meanwhile: there is nothing to copy any more.
                return ""
            except (StoreError, ConflictError) as error:
                if isinstance(error, StoreError) and not isinstance(error, SilentError):
                    self.give_up(store, error)
                reasons.append(f"not copied to {store.directory}: {error}")
        return "; ".join(reasons)

    def _source(self, bundle: StoredBundle, stores: Sequence[Store]) -> list[Store]:
        """The one of the stores that the bundle is read from, if it is among them."""
        return [store for store in stores if store.directory == bundle.directory.parents[2]]

    def _copy(self, bundle: StoredBundle, store: Store) -> None:
        made = bundle.header.metadata
        try:
            with self._turn(made.bundle_id, store.directory):
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
    def _turn(self, bundle_id: str, directory: Path) -> Iterator[None]:
        """One copy of a bundle to a directory at a time; a deletion leaves its tombstone as long as there is any.

        Raises ConflictError if the one before lasts: the disk that it reads from may hang.
        """
        with self._lock:
            turns = self._copies.setdefault((bundle_id, directory), _Turns())
            turns.count += 1
        try:
            if not turns.lock.acquire(timeout=_TURN_PATIENCE):
                raise ConflictError(f"bundle {bundle_id} is being copied to {directory} already")
            try:
                yield
            finally:
                turns.lock.release()
        finally:
            with self._lock:
                turns.count -= 1
                if not turns.count:
                    del self._copies[bundle_id, directory]

    def _is_buried(self, bundle_id: str) -> bool:
        return self.tombstones is not None and self.tombstones.has(bundle_id)

    def delete(self, zone: str, bundle_id: str) -> int:
        """Remove a committed bundle from every directory; returns the bytes freed.

        Directories that are away hear of it by the tombstone. Raises NoSuchBundleError, StoreError.
        """
        stores = self.usable()
        is_there = any(self._has_any(store, store.bundle_directory(zone, bundle_id)) for store in stores)
        # A directory that is away may have it, and is told by the tombstone.
        if not is_there and len(stores) == len(self.directories):
            raise NoSuchBundleError(zone, bundle_id)
        return self.delete_all([(zone, bundle_id)])

    def _has_any(self, store: Store, directory: Path) -> bool:
        try:
            return self.on(store, partial(_is_there, directory))
        except SilentError:
            # As one that is away: it may have it, and is told by the tombstone.
            return True

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
                freed += self.on(store, partial(_remove_all, store, bundles))
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
            free = set(bundle_ids) - {bundle_id for bundle_id, _ in self._copies}
        try:
            for store in stores:
                free -= set(self.on(store, partial(left, store)))
        except SilentError:
            return
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
            try:
                for directory in self.on(store, partial(_directories, store)):
                    if directory.name in buried:
                        deleted += self._delete_buried(store, directory, problems)
            except SilentError as error:
                problems.append(str(error))
        for bundle in self._each(stores, problems):
            if not self.is_everywhere(bundle) and not self._is_buried(bundle.header.metadata.bundle_id):
                if reason := self.copy(bundle):
                    problems.append(reason)
                else:
                    copied += 1
        self._bury(buried, _names)
        return copied, deleted, problems

    def _each(self, stores: Sequence[Store], problems: list[str]) -> Iterator[StoredBundle]:
        """Every bundle that is whole, once."""
        for number, store in enumerate(stores):
            try:
                for bundle in self.each(store, store.stored):
                    if not self._is_in_one(stores[:number], bundle):
                        yield bundle
            except SilentError as error:
                problems.append(str(error))

    def _is_in_one(self, stores: Sequence[Store], bundle: StoredBundle) -> bool:
        made = bundle.header.metadata
        return any(self.on(store, partial(_has, store, made.zone, made.bundle_id)) for store in stores)

    def _delete_buried(self, store: Store, directory: Path, problems: list[str]) -> int:
        try:
            self.on(store, partial(store.remove, directory))
        except NoSuchBundleError:
            return 0
        except StoreError as error:
            problems.append(str(error))
            return 0
        return 1


def _is_there(directory: Path) -> bool:
    return os.path.lexists(directory / MANIFEST) or os.path.lexists(directory / DELETED)


def _left_of(bundles: Sequence[tuple[str, str]]) -> Callable[[Store], Collection[str]]:
    def left(store: Store) -> list[str]:
        return [bundle_id for zone, bundle_id in bundles if os.path.lexists(store.bundle_directory(zone, bundle_id))]

    return left


def _names(store: Store) -> list[str]:
    return [directory.name for directory in store.directories()]


def _directories(store: Store) -> list[Path]:
    return list(store.directories())


def _has(store: Store, zone: str, bundle_id: str) -> bool:
    try:
        store.find(zone, bundle_id)
    except (NoSuchBundleError, StoreError):
        return False
    return True


def _has_same(store: Store, bundle: StoredBundle) -> bool:
    made = bundle.header.metadata
    there = store.find(made.zone, made.bundle_id)
    return there.directory == bundle.directory or has_same_bytes(there.manifest, bundle.manifest)


def _remove_all(store: Store, bundles: Sequence[tuple[str, str]]) -> int:
    return store.remove_all(store.bundle_directory(zone, bundle_id) for zone, bundle_id in bundles)
