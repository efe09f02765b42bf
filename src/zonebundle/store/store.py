"""The one writer of a store directory: makes it, recovers it, removes bundles from it.

Removal is in an order that is safe at every crash point: the manifest is renamed to `manifest.deleted`, from where on
there is no bundle; then the frame goes, then the segments that nothing else uses, and last the renamed manifest, which
until then tells a recovery which segments to look at (see prune).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from zonebundle.errors import ConflictError, NoSuchBundleError, StoreError
from zonebundle.host import syscalls, trace
from zonebundle.host.files import (
    make_private_directory,
    remove_temporaries,
    remove_tree,
    sync_directory,
    write_durably,
)
from zonebundle.host.reserve import Reserve
from zonebundle.model.ids import decode_zone_name
from zonebundle.store.bundle import DELETED, MANIFEST, StoredBundle, segments_in
from zonebundle.store.failure import store_errors
from zonebundle.store.objects import SegmentStore
from zonebundle.store.prune import Guard, NobodyElse, Pruner
from zonebundle.store.reader import BUNDLES, FORMAT, SEGMENTS, STORE_FORMAT, StoreReader, read_format

# For the frame, manifest and directories of a bundle whose logs have filled the disk.
_RESERVE = "reserve"
_RESERVE_BYTES = 4 << 20
_log = structlog.get_logger()
# What a directory that is to become a store may hold: mkfs makes the first, a crash of `open` leaves the second.
_NOTHING = ("lost+found", f".{FORMAT}.")


class Store(StoreReader):
    """A store directory, opened for writing by one process at a time. Its methods may be called from any thread."""

    segments: SegmentStore

    def __init__(self, directory: Path, segments: SegmentStore, lock: int, store_id: str, guard: Guard) -> None:
        super().__init__(directory, segments)
        self.pruner = Pruner(segments, self._referenced, guard)
        self.segments = segments
        self.store_id = store_id
        self._lock = lock
        self._reserve = Reserve(directory / _RESERVE, _RESERVE_BYTES)
        # Bundles of one zone share a directory, which a deletion removes when it is empty.
        self._directories = threading.Lock()
        # What a seal, or a copy, is writing.
        self._drafts: set[Path] = set()
        # Bundles that are visible, and would perhaps not be after a power cut.
        self._unsure: set[Path] = set()
        self._deleting = threading.Lock()

    @classmethod
    def open(cls, directory: Path, guard: Guard | None = None, *, make: bool = True) -> Store:
        """Create the store (unless not `make`) or take it over, and remove what a crash left half done.

        `guard` tells who uses it besides.

        Raises FormatError if it is a newer one, StoreError if it cannot be written, is somebody else's directory, or
        has another writer already.
        """
        with contextlib.ExitStack() as stack:
            with store_errors(f"opening store {directory}"):
                store_id = prepare(directory) if make else read_format(directory)
                if store_id is None:
                    raise StoreError(f"there is no store in {directory}: its file system may not be mounted")
                lock = os.open(directory / FORMAT, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise StoreError(f"store {directory} has a writer already; stop the other sealer") from None
            segments = SegmentStore(directory / SEGMENTS)
            stack.callback(segments.close)
            store = cls(directory, segments, lock, store_id, guard or NobodyElse())
            store.pruner.recover()
            store.recover()
            store.refill_reserve()
            # What an earlier writer renamed and did not get to make durable is relied on from here.
            with store_errors(f"writing out store {directory}"):
                syscalls.syncfs(lock)
            stack.pop_all()
        return store

    def is_in_place(self) -> bool:
        """Whether the directory that is open is still the one at its path: disks come and go."""
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self.directory / FORMAT))
        except OSError:
            return False

    def unlock(self) -> None:
        """Let others write to it. Nothing may be done with it any more."""
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the directory back to other writers."""
        self.segments.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def recover(self) -> int:
        """Remove drafts that were left and finish deletions; returns how many there were.

        Segments of drafts stay, for the next try to seal the bundle; `sweep` removes them when there is nothing left to
        seal.
        """
        with store_errors(f"cleaning up {self.directory}"):
            remove_temporaries(self.directory)
        self.segments.tidy()
        found = 0
        deleted = []
        for directory in list(self.directories()):
            if (directory / DELETED).exists():
                deleted.append(directory)
                found += 1
            elif not (directory / MANIFEST).exists():
                found += self._remove_left(directory)
        if deleted:
            with self._deleting:
                self._finish_deletions([directory for directory in deleted if (directory / DELETED).exists()])
        if self.pruner.is_waiting:
            self.pruner.finish()
        for zone in self.zones():
            self._remove_if_empty(zone)
        return found

    def _remove_left(self, directory: Path) -> bool:
        with store_errors(f"removing {directory}"), self._directories:
            if directory in self._drafts or (directory / MANIFEST).exists() or (directory / DELETED).exists():
                return False
            if directory.is_symlink() or not directory.is_dir():
                # Not ours, whatever it is.
                return False
            remove_tree(directory)
            return True

    def delete(self, zone: str, bundle_id: str) -> int:
        """Remove a committed bundle, and finish a removal that failed before; returns the bytes freed.

        Raises NoSuchBundleError (also for a bundle that is not committed yet), StoreError. A download of it that has
        begun ends with an error, unless its segments are leased.
        """
        return self.remove(self.bundle_directory(zone, bundle_id))

    def remove(self, directory: Path) -> int:
        """As `delete`, by the bundle's directory."""
        with self._deleting:
            self._uncommit(directory)
            return self._finish_deletions([directory])

    def remove_all(self, directories: Iterable[Path]) -> int:
        """As `remove`, of many bundles at the cost of one; those that are gone already are passed over."""
        with self._deleting:
            uncommitted = []
            for directory in directories:
                with contextlib.suppress(NoSuchBundleError):
                    self._uncommit(directory)
                    uncommitted.append(directory)
            return self._finish_deletions(uncommitted)

    def _uncommit(self, directory: Path) -> None:
        with store_errors(f"deleting {directory}"):
            try:
                with self._directories:
                    os.rename(directory / MANIFEST, directory / DELETED)
            except (FileNotFoundError, NotADirectoryError):
                if not (directory / DELETED).exists():
                    raise NoSuchBundleError(decode_zone_name(directory.parent.name), directory.name) from None
            sync_directory(directory)
        trace.point("delete.uncommitted")

    def sweep(self) -> int:
        """Remove every segment that no bundle uses and that has no lease; returns the bytes freed.

        What a crash leaves without a reference goes this way. Run it with nothing left to seal: a segment that was
        put and not flushed is not looked at, one of a bundle to be sealed again would have to be made again.
        """
        # What a failure left: the next start may be far.
        self.recover()
        with store_errors(f"listing the segments of {self.directory}"):
            candidates = list(self.segments.digests())
        return self.remove_unreferenced(candidates)

    def remove_unreferenced(self, candidates: list[str] | set[str]) -> int:
        """Remove those of the segments that no bundle uses and that have no lease; returns the bytes freed."""
        return self.pruner.prune(candidates)

    def make_draft(self, zone: str, bundle_id: str) -> Path:
        """A fresh directory for a bundle, up to `publish` or `remove_draft`.

        Raises ConflictError if the bundle is there already, or being written; StoreError.
        """
        directory = self.bundle_directory(zone, bundle_id)
        with store_errors(f"making {directory}"), self._directories:
            if (directory / MANIFEST).exists() or (directory / DELETED).exists():
                raise ConflictError(f"bundle {bundle_id} of '{zone}' is in store {self.directory} already")
            if directory in self._drafts:
                raise ConflictError(f"bundle {bundle_id} of '{zone}' is being written to store {self.directory}")
            remove_tree(directory)
            make_private_directory(directory.parent)
            make_private_directory(directory)
            self._drafts.add(directory)
        return directory

    def refill_reserve(self) -> None:
        """Keep a little space back, with which a bundle can be ended when there is no more; if there is that little."""
        try:
            self._reserve.refill()
        except OSError as error:
            _log.warning("no space for the store's reserve", directory=str(self.directory), reason=error.strerror)

    def spend_reserve(self) -> None:
        """Free the space that was kept back."""
        with store_errors(f"freeing {self.directory / _RESERVE}"):
            self._reserve.release_all()

    def publish(self, directory: Path, draft: str) -> None:
        """Commit a bundle: the file `draft` in its directory, durable as all the rest, becomes the manifest."""
        # A deletion that saw the manifest waits until it is durable, and does not take the directory away meanwhile.
        with store_errors(f"committing {directory}"), self._directories:
            os.rename(directory / draft, directory / MANIFEST)
            self._unsure.add(directory)
            sync_directory(directory)
            self._unsure.discard(directory)
            self._drafts.discard(directory)

    def unpublish(self, directory: Path) -> None:
        """Undo a `publish` of which only the last fsync failed, if there was one.

        Raises StoreError; then the bundle is whole and visible, and `find` looks whether it is durable.
        """
        try:
            with store_errors(f"removing {directory}"), contextlib.suppress(FileNotFoundError):
                os.unlink(directory / MANIFEST)
            self._unsure.discard(directory)
        except StoreError:
            self._drafts.discard(directory)
            raise

    def find(self, zone: str, bundle_id: str) -> StoredBundle:
        """As of any reader. It is durable; raises StoreError if that cannot be said."""
        bundle = super().find(zone, bundle_id)
        if bundle.directory in self._unsure:
            with store_errors(f"making {bundle.directory} durable"):
                sync_directory(bundle.directory)
            self._unsure.discard(bundle.directory)
        return bundle

    def remove_draft(self, directory: Path) -> None:
        """Remove the directory of a bundle that was not committed."""
        try:
            with store_errors(f"removing {directory}"):
                remove_tree(directory)
                self._remove_if_empty(directory.parent)
        finally:
            self._drafts.discard(directory)

    def _finish_deletions(self, directories: Sequence[Path]) -> int:
        freed = 0
        candidates: set[str] = set()
        if not directories:
            return freed
        for directory in directories:
            with store_errors(f"deleting {directory}"):
                for file in _files(directory):
                    if file.name != DELETED and not file.is_dir(follow_symlinks=False):
                        freed += os.stat(file.path).st_size
                        os.unlink(file.path)
                candidates.update(segments_in(directory / DELETED))
        trace.point("delete.frame-removed")
        freed += self.remove_unreferenced(candidates)
        trace.point("delete.segments-removed")
        for directory in directories:
            with store_errors(f"deleting {directory}"):
                freed += (directory / DELETED).stat().st_size
                # Not synced: what a power cut brings back of it is removed by `recover`.
                remove_tree(directory)
                self._remove_if_empty(directory.parent)
        return freed

    def _remove_if_empty(self, zone: Path) -> None:
        with self._directories, contextlib.suppress(OSError):
            zone.rmdir()

    def _referenced(self, digests: frozenset[str]) -> set[str]:
        used: set[str] = set()
        for directory in self.directories():
            with store_errors(f"reading {directory / MANIFEST}"):
                try:
                    used.update(digest for digest in segments_in(directory / MANIFEST) if digest in digests)
                except (FileNotFoundError, NotADirectoryError):
                    # Drafts protect their segments by leases.
                    continue
        return used


def prepare(directory: Path) -> str:
    """Make a directory a store if it is none yet; returns the store's ID. Raises FormatError, StoreError."""
    with store_errors(f"preparing store {directory}"):
        return read_format(directory) or _make(directory)


def _make(directory: Path) -> str:
    make_private_directory(directory)
    foreign = [name for name in os.listdir(directory) if not name.startswith(_NOTHING)]
    if foreign:
        raise StoreError(f"{directory} is neither empty nor a store; name another directory in [store] dirs")
    # First of all: everything else in the directory is ours because of it.
    store_id = str(uuid.uuid4())
    write_durably(directory / FORMAT, f"zonebundle store {STORE_FORMAT} {store_id}\n".encode("ascii"))
    make_private_directory(directory / BUNDLES)
    sync_directory(directory.parent)
    return store_id


def _files(directory: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as files:
        yield from files
