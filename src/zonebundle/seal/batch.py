"""Rotated logs on their way into a store, before any bundle needs them: read, made pieces, told to the index, claimed.

What is in the store and not in the index is nobody's, so until both are done and the claim protects the segments, they
have a lease. In memory are one group of chunks and one pack.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from zonebundle.errors import HostError, StoreError
from zonebundle.host import syscalls, trace
from zonebundle.host.files import open_regular_beneath
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece
from zonebundle.seal.compress import MAGIC, PACK_BYTES, PACK_LOGS, cut, make_pieces
from zonebundle.seal.known import Known
from zonebundle.seal.marks import CrashMarks
from zonebundle.seal.reading import has_holes, next_data
from zonebundle.seal.rotated import File, Rotated
from zonebundle.seal.workers import GROUP, Workers
from zonebundle.snapshots.links import is_suspect
from zonebundle.snapshots.place import is_unwritten
from zonebundle.store.index import Index
from zonebundle.store.pieces import SMALL, is_compressed
from zonebundle.store.store import Store

OWNER = "ahead"
# The crash mark of a pack; those of other logs are their inodes.
_A_PACK = 0
# After so many raw bytes, or logs, they are made durable and told to the index.
_BYTES = 64 << 20
_LOGS = 4096


class Batch:
    """The logs of one run. Used by one thread; nothing of it is on its way when a method returns.

    `pace` is called before each step: it may wait, and ends the run by an exception.
    """

    def __init__(
        self,
        store: Store,
        index: Index,
        workers: Workers,
        marks: CrashMarks,
        pace: Callable[[], None],
        largest: int,
    ) -> None:
        """Files of more than `largest` bytes are left to the seals, which keep a part of them."""
        self._store = store
        self._index = index
        self._workers = workers
        self._marks = marks
        self._pace = pace
        self._largest = largest
        self._known = Known(index, store, OWNER)
        self._pack: list[tuple[FileIdentity, bytes]] = []
        self._pack_bytes = 0
        self._sealed: list[tuple[FileIdentity, list[Piece]]] = []
        self._claims: defaultdict[str, list[File]] = defaultdict(list)
        self._waiting_bytes = self._waiting_logs = 0
        # The segments of files that are known.
        self._kept: set[str] = set()
        # Segments that nobody may need any more: of what files were before, and what was made in vain.
        self.unneeded: set[str] = set()
        self.files = self.bytes = self.known = 0

    def take(self, zone: str, log: Rotated) -> bool:
        """Claim a log for the zone, and seal it if it is not known as it is; False if it has to be tried again.

        It may still change its mind while the log is read. Raises StoreError.
        """
        status = log.status
        filesystem = log.directory.filesystem
        # The index has its time of birth.
        listed = FileIdentity(filesystem, status.st_ino, 0, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if (found := self._known.file(listed)) is not None:
            self._kept.update(piece.segment for piece in found[1])
            self.known += 1
        elif status.st_size > self._largest or self._marks.skips(status.st_ino):
            return True
        elif not self._seal(log):
            return False
        self._claims[zone].append((filesystem, status.st_ino))
        self._waiting_logs += 1
        if self._waiting_bytes >= _BYTES or self._waiting_logs >= _LOGS:
            self.commit()
        return True

    def _seal(self, log: Rotated) -> bool:
        """Read a log, if nobody writes to it; whether that is done."""
        now = time.time_ns()
        try:
            descriptor, status = open_regular_beneath(log.descriptor, log.name)
        except (OSError, HostError):
            # Gone, replaced, or not ours to read: if that changes, so does the directory.
            return True
        try:
            identity = _identify(log, descriptor, status)
            if is_suspect(status, log.owner) or not status.st_size or status.st_size > self._largest:
                return True
            if status.st_ino != log.status.st_ino or not identity.is_settled(now) or not is_unwritten(descriptor):
                return False
            self._pace()
            return self._read(descriptor, status, identity)
        except OSError:
            # What cannot be read is the seal's to tell, if it comes to that.
            return True
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, status: os.stat_result, identity: FileIdentity) -> bool:
        if status.st_size < SMALL:
            raw = os.pread(descriptor, status.st_size, 0)
            trace.point("ahead.read")
            if len(raw) < status.st_size or not _is_unchanged(descriptor, status):
                return False
            self._put_in_pack(identity, raw)
        else:
            pieces = self._read_chunks(descriptor, status)
            trace.point("ahead.read")
            if not pieces or not _is_unchanged(descriptor, status):
                return False
            self._sealed.append((identity, pieces))
        self._waiting_bytes += status.st_size
        self.files += 1
        self.bytes += status.st_size
        return True

    def _read_chunks(self, descriptor: int, status: os.stat_result) -> list[Piece]:
        """The pieces of a log; none if it has become shorter."""
        size = status.st_size
        is_sparse = has_holes(status)
        is_stored: bool | None = None
        pieces: list[Piece] = []
        group: list[bytes] = []
        for at, length, zeros in cut(0, size, lambda at: next_data(descriptor, at, size) if is_sparse else at):
            if group and (zeros or len(group) == GROUP):
                pieces += self._make(group, status.st_ino, is_stored)
                group = []
            if zeros:
                pieces.append(self._store.segments.zero_piece(zeros, OWNER))
                continue
            self._pace()
            raw = os.pread(descriptor, length, at)
            if len(raw) < length:
                return []
            if is_stored is None:
                is_stored = at == 0 and is_compressed(raw[:MAGIC])
            group.append(raw)
        return pieces + self._make(group, status.st_ino, is_stored) if group else pieces

    def _put_in_pack(self, identity: FileIdentity, raw: bytes) -> None:
        if self._pack and (self._pack_bytes + len(raw) > PACK_BYTES or len(self._pack) >= PACK_LOGS):
            self.close_pack()
        self._pack.append((identity, raw))
        self._pack_bytes += len(raw)
        if self._marks.suspects(_A_PACK):
            self.close_pack()

    def close_pack(self) -> None:
        """Make pieces of the small logs that were taken. Raises StoreError."""
        pack, self._pack = self._pack, []
        self._pack_bytes = 0
        if pack:
            mark = _A_PACK if len(pack) > 1 else pack[0][0].inode
            pieces = self._make([raw for _, raw in pack], mark, None)
            self._sealed += [(identity, [piece]) for (identity, _), piece in zip(pack, pieces, strict=True)]

    def _make(self, raws: Sequence[bytes], mark: int, is_stored: bool | None) -> list[Piece]:
        """One job at a time, behind everything else."""

        def work(slot: int) -> list[Piece]:
            self._marks.begin(slot, mark, mark)
            try:
                return make_pieces(raws, self._known, self._store.segments, OWNER, is_stored=is_stored)
            finally:
                self._marks.end(slot)

        return self._workers.submit(work, last=True).result()

    def commit(self) -> None:
        """Make durable what was taken, tell the index, claim it; the leases end. Raises StoreError."""
        self.close_pack()
        # Also what was made in vain: it has a name then, under which it can be removed.
        self._store.segments.flush()
        if missing := self._store.segments.missing(OWNER):
            # Another's flush had taken them along, and failed.
            raise StoreError(f"{len(missing)} segments that were sealed ahead could not be kept")
        if self._sealed:
            self._note_replaced()
            self._index.add(self._sealed)
            trace.point("ahead.added")
        for zone, files in self._claims.items():
            self._index.claim(zone, files)
        leased = self._store.segments.release(OWNER)
        self.unneeded |= leased - self._kept - {piece.segment for _, pieces in self._sealed for piece in pieces}
        self._begin()

    def _note_replaced(self) -> None:
        """What was claimed of these files in another state is used by nobody, unless by a bundle."""
        for identity, pieces in self._sealed:
            before = self._index.find_file(identity.filesystem, identity.inode)
            if before is not None:
                old = {piece.segment for piece in before.pieces} - {piece.segment for piece in pieces}
                self.unneeded |= self._index.claimed(old) if old else set()

    def abandon(self) -> None:
        """After an error: nothing of what was taken since the last commit is kept."""
        try:
            # What was put and not flushed has no final name yet, under which it could be removed.
            self._store.segments.flush()
        except StoreError:
            # Then it has removed them.
            pass
        self.unneeded |= self._store.segments.release(OWNER) - self._kept
        self._begin()

    def _begin(self) -> None:
        self._pack.clear()
        self._pack_bytes = 0
        self._sealed.clear()
        self._claims.clear()
        self._kept.clear()
        self._waiting_bytes = self._waiting_logs = 0


def _identify(log: Rotated, descriptor: int, status: os.stat_result) -> FileIdentity:
    born = syscalls.birth_time_ns(descriptor)
    filesystem = log.directory.filesystem
    return FileIdentity(filesystem, status.st_ino, born, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_unchanged(descriptor: int, before: os.stat_result) -> bool:
    now = os.fstat(descriptor)
    return (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (before.st_size, before.st_mtime_ns, before.st_ctime_ns)
