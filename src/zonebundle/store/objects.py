"""The segments of one store directory: `segments/ab/<digest>.gz`, written once and never changed.

A segment is written under a name in `segments/tmp`, made durable, and renamed: whoever finds one by its digest, in this
or another process, finds all of it, now and after a power cut. `flush` does that for everything that was put before,
and callers that come at the same time share one run of it, as databases do with group commits.

A bundle that is being written holds a lease on its segments, taken in `put` before the segment is looked for, so that a
removal running at the same time can neither miss it nor win the race. Leases live in this process: it alone removes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from zonebundle.errors import DamagedError, StoreError
from zonebundle.host import syscalls, trace
from zonebundle.host.files import make_private_directory, sync_directory, write_all
from zonebundle.model.manifest import Piece
from zonebundle.store.failure import explain, store_errors
from zonebundle.store.pieces import CHUNK, Run, deflate
from zonebundle.store.segment import build_segment
from zonebundle.store.segments import DIGEST, PRUNED, TEMPORARY, Segments

# Up to this many files are made durable one by one. syncfs costs 26 ms for 500 segments where that costs 130 (ext4; on
# btrfs 33 and 435), but it also writes out whatever else is dirty on the file system, however much that is.
_SYNCED_ONE_BY_ONE = 64
# Bytes after which the writing thread flushes by itself: a disk slower than the cores slows them down instead of
# filling the memory with unwritten pages. (sync_file_range for each file costs more CPU than it wins time.)
_UNWRITTEN = 64 << 20


class SegmentStore(Segments):
    """The one writer of a store directory's segments; its methods may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        """Make the directories, and remove what an earlier writer left half done. Raises StoreError."""
        super().__init__(directory)
        with store_errors(f"preparing {directory}"):
            make_private_directory(directory)
            make_private_directory(directory / TEMPORARY)
            make_private_directory(directory / PRUNED)
            for name in os.listdir(directory / TEMPORARY):
                os.unlink(directory / TEMPORARY / name)
            # It stays open: syncfs reports write errors that happened since this descriptor was opened.
            self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._pruned = f"{self._root}/{PRUNED}"
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        # Digest → temporary file: what the next flush commits, and what one is committing now.
        self._pending: dict[str, str] = {}
        self._committing: dict[str, str] | None = None
        self._pending_bytes = 0
        self._unsynced: set[str] = set()
        # Temporary files that could not be removed.
        self._left: set[str] = set()
        # Work is numbered: a flush waits until what was numbered before it is durable.
        self._sequence = 0
        self._durable = 0
        self._failures = 0
        self._failure = StoreError()
        self._leases: dict[str, set[str]] = {}
        self._removal = threading.Lock()
        self._condemned: set[str] = set()
        self._zero_run: Run | None = None

    def close(self) -> None:
        """Give the descriptor back. What was not flushed is removed by the next writer."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def put(self, runs: Sequence[Run], owner: str) -> list[Piece]:
        """Write the segment of `runs` under a lease of `owner` and return one piece a run, in their order.

        A segment that is known is not written again. It is durable after the next `flush`. Raises StoreError.
        """
        digest, data, pieces = build_segment(runs)
        self._keep(digest, data, owner)
        return pieces

    def adopt(self, digest: str, data: bytes, owner: str) -> None:
        """Write a segment that another store has, under a lease of `owner`; durable after the next `flush`.

        Raises DamagedError if the bytes are not those of the segment, StoreError.
        """
        if blake3(data).hexdigest() != digest:
            raise DamagedError(f"the bytes that were read for segment {digest} are not its own; verify that store")
        self._keep(digest, data, owner)

    def _keep(self, digest: str, data: bytes, owner: str) -> None:
        with self._condition:
            self._leases.setdefault(owner, set()).add(digest)
            self._condemned.discard(digest)
            if self._is_put(digest):
                return
        try:
            if not self._is_whole(digest, len(data)):
                self._write(digest, data)
        except OSError as error:
            self.release_missing(owner)
            raise explain(f"writing a segment of {len(data)} bytes below {self._root}", error) from error
        with self._condition:
            # Another thread may have failed with the same one.
            self._leases.setdefault(owner, set()).add(digest)
        if self._pending_bytes >= _UNWRITTEN:
            self.flush()

    def zero_piece(self, times: int, owner: str) -> Piece:
        """The one piece of CHUNK zero bytes that all holes share, `times` times, leased to `owner`."""
        if self._zero_run is None:
            self._zero_run = deflate(bytes(CHUNK))
        (piece,) = self.put([self._zero_run], owner)
        return Piece(piece.segment, piece.offset, piece.packed, piece.raw, piece.crc32, piece.blake3, times)

    def flush(self) -> None:
        """Return when all that was put before the call is durable and has its final name. Raises StoreError.

        After an error the segments concerned are gone, for every bundle that had put them: see `missing`.
        """
        with self._condition:
            wanted = self._sequence
            failures = self._failures
            while self._durable < wanted:
                if self._committing is None:
                    self._lead()
                else:
                    self._condition.wait()
                if self._failures > failures:
                    raise type(self._failure)(str(self._failure)) from self._failure.__cause__

    def lease(self, owner: str, digests: Iterable[str] = ()) -> None:
        """Protect these segments, and what `owner` puts later, from removal until `release`.

        Raises DamagedError if one is neither there nor put; the lease then stays with the others.
        """
        for digest in digests:
            with self._condition:
                self._leases.setdefault(owner, set()).add(digest)
                self._condemned.discard(digest)
                known = self._is_put(digest) or self.exists(digest) or self._put_back(digest)
                if not known:
                    self._leases[owner].discard(digest)
            if not known:
                raise DamagedError(f"segment {self.path(digest)} is missing; restore it from a copy of the store")

    def holds(self, owner: str, digest: str) -> bool:
        """Whether `owner` has a lease on the segment."""
        return digest in self._leases.get(owner, ())

    def release(self, owner: str) -> set[str]:
        """End the lease of `owner`, and return the digests that it was on."""
        with self._condition:
            return self._leases.pop(owner, set())

    def missing(self, owner: str) -> list[str]:
        """The segments under the lease of `owner` that are not at their final name: none after a good `flush`."""
        with self._condition:
            digests = list(self._leases.get(owner, ()))
        return [digest for digest in digests if not self.exists(digest)]

    def release_missing(self, owner: str) -> None:
        """End the leases of `owner` on segments that are neither there nor put: nobody has kept them."""
        with self._condition:
            held = self._leases.get(owner, set())
            held -= {digest for digest in held if not self._is_put(digest) and not self.exists(digest)}

    def set_aside(self, candidates: Iterable[str], chosen: Callable[[frozenset[str]], Iterable[str]]) -> set[str]:
        """Move to `pruned/` those of `candidates` that have no lease and that `chosen` returns; returns the moved ones.

        What is put or leased while `chosen` looks stays. Raises StoreError; what was moved till then stays moved.
        """
        with self._removal:
            with self._condition:
                leased = set[str]().union(*self._leases.values())
                self._condemned = {digest for digest in candidates if digest not in leased}
            try:
                doomed = self._condemned and set(chosen(frozenset(self._condemned)))
                return self._move_aside(doomed) if doomed else set()
            finally:
                self._condemned = set()

    def _move_aside(self, digests: set[str]) -> set[str]:
        moved = set()
        directories = {self._pruned}
        with store_errors(f"removing segments below {self._root}"):
            for digest in digests:
                path = self.path(digest)
                with self._condition:
                    # A lease that came meanwhile has taken it off this list, even if it has ended again.
                    if digest not in self._condemned:
                        continue
                    try:
                        os.rename(path, self._aside(digest))
                    except FileNotFoundError:
                        continue
                moved.add(digest)
                directories.add(os.path.dirname(path))
            self._sync_directories(directories)
        return moved

    def aside(self) -> list[str]:
        """The segments that were set aside and neither put back nor dropped, also by an earlier writer."""
        with store_errors(f"listing {self._pruned}"):
            names = [name.removesuffix(".gz") for name in os.listdir(self._pruned)]
        return [digest for digest in names if DIGEST.fullmatch(digest)]

    def aside_bytes(self) -> int:
        """Bytes on disk of what was set aside and not dropped yet."""
        total = 0
        with store_errors(f"listing {self._pruned}"), os.scandir(self._pruned) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
        return total

    def put_back(self, digests: Iterable[str]) -> None:
        """Give segments that were set aside their place again. Raises StoreError."""
        with store_errors(f"putting segments back below {self._root}"):
            for digest in digests:
                with self._condition:
                    self._put_back(digest)

    def _put_back(self, digest: str) -> bool:
        """With the condition held: whether the segment was aside, and is in its place now."""
        path = self.path(digest)
        try:
            os.link(self._aside(digest), path)
        except FileNotFoundError:
            # Its directory is never removed, so it is the segment that is not there.
            return False
        except FileExistsError:
            # It was put again meanwhile.
            pass
        os.unlink(self._aside(digest))
        sync_directory(os.path.dirname(path))
        return True

    def drop_aside(self, digests: Iterable[str]) -> int:
        """Remove segments that were set aside for good; returns the bytes freed. Raises StoreError."""
        freed = 0
        with store_errors(f"removing segments in {self._pruned}"):
            for digest in digests:
                with self._condition, contextlib.suppress(FileNotFoundError):
                    size = os.stat(self._aside(digest)).st_size
                    os.unlink(self._aside(digest))
                    freed += size
        return freed

    def _aside(self, digest: str) -> str:
        return f"{self._pruned}/{digest}.gz"

    def _is_whole(self, digest: str, length: int) -> bool:
        try:
            return os.stat(self.path(digest)).st_size == length
        except FileNotFoundError:
            return False

    def _write(self, digest: str, data: bytes) -> None:
        temporary = f"{self._root}/{TEMPORARY}/{next(self._numbers)}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                write_all(descriptor, data)
            finally:
                os.close(descriptor)
            trace.point("seal.segment-written")
        except BaseException:
            self._forget(temporary)
            raise
        with self._condition:
            # Two threads may have had the same content; one copy is enough.
            if self._pending.setdefault(digest, temporary) == temporary:
                self._sequence += 1
                self._pending_bytes += len(data)
                return
        os.unlink(temporary)

    def tidy(self) -> None:
        """Try once more to remove what failed writes have left. What still cannot go is the next writer's."""
        for temporary in list(self._left):
            self._forget(temporary)

    def _forget(self, temporary: str) -> None:
        # The error that led here is the one to tell.
        self._left.add(temporary)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if not os.path.lexists(temporary):
            self._left.discard(temporary)

    def _is_put(self, digest: str) -> bool:
        return digest in self._pending or (self._committing is not None and digest in self._committing)

    def _lead(self) -> None:
        """Commit what is pending, for all who wait. Called with the condition held, which it gives up meanwhile."""
        batch, self._pending = self._pending, {}
        self._pending_bytes = 0
        self._committing = batch
        upto = self._sequence
        self._condition.release()
        failure: BaseException | None = None
        try:
            self._commit(batch)
        except BaseException as error:
            # Never tried again: after a failed write-out the kernel takes the lost pages for clean.
            failure = error
            for temporary in batch.values():
                self._forget(temporary)
            if not isinstance(error, OSError):
                raise
        finally:
            self._condition.acquire()
            self._committing = None
            self._durable = upto
            if failure:
                doing = f"making {len(batch)} segments durable below {self._root}"
                self._failures += 1
                self._failure = (
                    explain(doing, failure) if isinstance(failure, OSError) else StoreError(f"{doing} was interrupted")
                )
                self._failure.__cause__ = failure
                # Names that are not durable yet are work for the next flush, whoever relies on them.
                self._sequence += bool(self._unsynced)
            self._condition.notify_all()

    def _commit(self, batch: dict[str, str]) -> None:
        if len(batch) > _SYNCED_ONE_BY_ONE:
            syscalls.syncfs(self._descriptor)
        else:
            for temporary in batch.values():
                _sync_data(temporary)
        for digest, temporary in batch.items():
            path = self.path(digest)
            directory = os.path.dirname(path)
            try:
                os.rename(temporary, path)
            except FileNotFoundError:
                make_private_directory(Path(directory))
                self._unsynced.add(self._root)
                os.rename(temporary, path)
            self._unsynced.add(directory)
        self._sync_directories(self._unsynced)
        self._unsynced.clear()

    def _sync_directories(self, directories: set[str]) -> None:
        if len(directories) > _SYNCED_ONE_BY_ONE:
            syscalls.syncfs(self._descriptor)
        else:
            for directory in directories:
                sync_directory(directory)


def _sync_data(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
