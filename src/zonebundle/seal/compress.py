"""From planned logs to pieces: read in order, compressed beside each other, given back in order."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Protocol

from zonebundle.errors import FullError
from zonebundle.host import trace
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece
from zonebundle.model.paths import printable
from zonebundle.model.quantities import format_size
from zonebundle.model.record import LogFile
from zonebundle.model.report import Gap
from zonebundle.seal.areas import OpenAreas
from zonebundle.seal.attempt import Attempt
from zonebundle.seal.jobs import Log, Pack, Ready, Share
from zonebundle.seal.known import Known
from zonebundle.seal.marks import CRASHES_TO_SKIP, CrashMarks
from zonebundle.seal.plan import PlannedLog
from zonebundle.seal.reading import LogReader, identify, read_whole
from zonebundle.seal.report import Gaps
from zonebundle.seal.workers import Group, Workers
from zonebundle.store.pieces import CHUNK, SMALL, Run, content_digest, deflate, is_compressed, store_uncompressed

# A pack is closed at so many raw bytes or logs, or when so many bytes have been read since it was begun: logs leave
# in order, so those behind it wait for it. It is no bigger than a chunk, to share out small logs over the workers.
PACK_BYTES = CHUNK
PACK_LOGS = 1024
_PACK_PATIENCE = 32 * CHUNK
# Logs of less than this many bytes on average take longer to handle than to compress.
_TINY = 16 << 10
# So many logs may wait in memory for the first of them.
_WAITING = 4 * PACK_LOGS
# The index is asked for so many files at once.
_ASKED_AT_ONCE = 256
# So many bytes of a file tell whether it is compressed.
MAGIC = 12


class Segments(Protocol):
    """Where the pieces go: the segments of a store. `owner` is the bundle's ID."""

    def put(self, runs: Sequence[Run], owner: str) -> list[Piece]: ...

    def zero_piece(self, times: int, owner: str) -> Piece: ...

    def flush(self) -> None: ...


def cut(start: int, end: int, next_data: Callable[[int], int]) -> Iterator[tuple[int, int, int]]:
    """Where a log that is not packed is cut: (offset, length, times), at multiples of CHUNK from the file's begin.

    So a log that has grown is cut alike. `times` is how many whole chunks of a hole begin there, 0 where bytes are to
    be read; `next_data` tells the first byte from an offset on that is not known to be in a hole.
    """
    while start < end:
        stop = min(start - start % CHUNK + CHUNK, end)
        zeros = (next_data(start) - start) // CHUNK if stop - start == CHUNK else 0
        stop = start + zeros * CHUNK if zeros else stop
        yield start, stop - start, zeros
        start = stop


def make_pieces(
    raws: Sequence[bytes], known: Known, segments: Segments, owner: str, *, is_stored: bool | None = None
) -> list[Piece]:
    """A piece for each of `raws`, leased to `owner`. Those that are not known are compressed, into one segment.

    `is_stored`: they are of a file that is compressed already; None: each is a whole file, which tells by itself.
    Raises StoreError.
    """
    digests = [content_digest(raw) for raw in raws]
    pieces = known.contents({digest: len(raw) for digest, raw in zip(digests, raws, strict=True)})
    runs: dict[str, Run] = {}
    for digest, raw in zip(digests, raws, strict=True):
        # Several logs may have one content.
        if digest not in pieces and digest not in runs:
            as_is = is_compressed(raw[:MAGIC]) if is_stored is None else is_stored
            runs[digest] = store_uncompressed(raw, digest) if as_is else deflate(raw, digest)
    if runs:
        pieces |= zip(runs, segments.put(list(runs.values()), owner), strict=True)
    return [pieces[digest] for digest in digests]


class Compression:
    """The logs of one bundle on their way to the store.

    Reading is done by the thread that iterates, so that a file system that hangs costs nobody else; compressing,
    hashing and writing by the shared workers, but for tiny logs, where threads would only stand in each other's way.
    In memory are the jobs in flight and one chunk, or pack, being read. A file that is known is not even read, a
    content that is known not compressed.
    """

    def __init__(
        self,
        areas: OpenAreas,
        workers: Workers,
        segments: Segments,
        owner: str,
        known: Known,
        marks: CrashMarks,
        gaps: Gaps,
        attempt: Attempt,
        read: Callable[[int], None],
        *,
        may_cut: bool = False,
    ) -> None:
        """`read` is told how many bytes have gone to the workers, at each step.

        `may_cut`: where the store is full, the logs from there on are a gap. They come newest first.
        """
        self._areas = areas
        self._workers = workers
        self._segments = segments
        self._owner = owner
        self._known = known
        self._marks = marks
        self._gaps = gaps
        self._attempt = attempt
        self._tell = read
        self._may_cut = may_cut
        self.is_cut = False
        self._logs: deque[Log] = deque()
        self._pack: Pack | None = None
        self._bytes = 0
        self._running: deque[Future[list[Piece]]] = deque()

    @contextlib.contextmanager
    def run(self, logs: Iterator[PlannedLog]) -> Iterator[Iterator[tuple[PlannedLog, list[Piece]]]]:
        """Every log with its pieces, in order. At the end of the context no worker has anything of it in its hands.

        Raises StoreError, SealCanceledError, and what reading raises for the bundle as a whole (see LogReader).
        """
        try:
            yield self._cut_where_full(logs)
        finally:
            wait(self._running)

    def _cut_where_full(self, planned: Iterator[PlannedLog]) -> Iterator[tuple[PlannedLog, list[Piece]]]:
        logs = self._look_ahead(planned)
        try:
            yield from self._iterate(logs)
        except FullError as error:
            if not self._may_cut:
                raise
            self.is_cut = True
            wait(self._running)
            left = [log.planned.length for log in self._logs]
            left += (log.length for log in logs)
            what = f"{len(left)} logs, {format_size(sum(left))}"
            self._gaps.add(Gap(what, f"they did not fit into the store, the newest are kept: {error}"))

    def _iterate(self, logs: Iterator[PlannedLog]) -> Iterator[tuple[PlannedLog, list[Piece]]]:
        for planned in logs:
            if self._marks.skips(planned.number):
                self._gap(planned, f"skipped: the sealer crashed {CRASHES_TO_SKIP} times while it worked on it")
                continue
            self._take(planned)
            if len(self._logs) > _WAITING:
                self._close_pack()
                self._logs[0].collect(block=True)
            while self._logs and self._logs[0].collect():
                yield self._leave()
        self._close_pack()
        while self._logs:
            self._logs[0].collect(block=True)
            yield self._leave()

    def _look_ahead(self, logs: Iterator[PlannedLog]) -> Iterator[PlannedLog]:
        while some := list(itertools.islice(logs, _ASKED_AT_ONCE)):
            self._known.foresee(planned.log.identity for planned in some)
            yield from some

    def _leave(self) -> tuple[PlannedLog, list[Piece]]:
        if self._may_cut:
            # What has left is kept, whatever does not fit later.
            self._segments.flush()
        log = self._logs[0]
        if not log.is_known:
            # It may find that the store is full: the log is then one of those that are left.
            self._known.note(log.identity, log.pieces)
        self._logs.popleft()
        return log.planned, log.pieces

    def _take(self, planned: PlannedLog) -> None:
        self._attempt.check()
        log = Log(planned, [], deque())
        self._logs.append(log)
        length = planned.length
        if not length or self._find(log):
            pass
        elif length < SMALL and not self._marks.suspects(planned.number):
            self._put_in_pack(log, length)
        else:
            if self._marks.suspects(planned.number):
                # Marks are ranges: no pack may reach over a suspect, who would be counted with it.
                self._close_pack()
            with LogReader(planned.log, self._areas, self._noter(planned)) as reader:
                self._read_chunks(log, reader)
            log.identity = reader.identity
        log.is_read = True
        if self._pack is not None and self._bytes - self._pack.begun >= _PACK_PATIENCE:
            self._close_pack()

    def _find(self, log: Log) -> bool:
        """Whether the log is known as a whole: then its pieces are there."""
        planned = log.planned.log
        if planned.pieces and self._known.recorded(planned.pieces):
            log.pieces = list(planned.pieces)
            log.is_known = True
            self._tell(log.planned.length)
            return True
        found = self._known.file(planned.identity) if not planned.first else None
        if found is None:
            return False
        known, log.pieces = found
        log.is_known = True
        # What cannot be looked at is only read again the next time.
        with contextlib.suppress(OSError):
            self._renew(planned, known)
        self._tell(log.planned.length)
        return True

    def _renew(self, log: LogFile, known: FileIdentity) -> None:
        """Of a link, the index is to know the ctime that the link has made: or it would not be known the next time."""
        if len(log.parts) != 1 or log.parts[0].origin != "staged" or not self._areas.may_hold_links(log.parts[0].area):
            return
        descriptor = self._areas.open(log.parts[0])
        try:
            now = identify(descriptor, log)
        finally:
            os.close(descriptor)
        if now is not None and replace(now, ctime_ns=known.ctime_ns) == known:
            self._known.renew(known, now.ctime_ns)

    def _put_in_pack(self, log: Log, length: int) -> None:
        pack = self._pack
        if pack is not None and (pack.size + length > PACK_BYTES or len(pack.logs) >= PACK_LOGS):
            self._close_pack()
            pack = None
        if pack is None:
            pack = self._pack = Pack(self._bytes)
        log.jobs.append(Share(pack, len(pack.logs)))
        pack.logs.append(log)
        pack.size += length
        self._bytes += length

    def _close_pack(self) -> None:
        pack, self._pack = self._pack, None
        if pack is None:
            return
        logs, pack.logs = pack.logs, []
        numbers = (logs[0].planned.number, logs[-1].planned.number)
        if pack.size < _TINY * len(logs):
            pack.future = Future()
            with self._workers.by_itself():
                raws = self._read_all(logs)
                pack.future.set_result(self._workers.run_here(lambda slot: self._compress(slot, raws, numbers)))
            self._tell(pack.size)
        else:
            raws = self._read_all(logs)
            pack.future = self._submit(lambda slot: self._compress(slot, raws, numbers), pack.size)

    def _read_all(self, logs: list[Log]) -> list[bytes]:
        raws = []
        for log in logs:
            raw, log.identity = read_whole(log.planned.log, self._areas, self._noter(log.planned))
            raws.append(raw)
        return raws

    def _read_chunks(self, log: Log, reader: LogReader) -> None:
        is_stored: bool | None = None
        with self._workers.group() as group:
            for at, length, zeros in cut(log.planned.log.first, log.planned.log.size, reader.next_data):
                self._attempt.check()
                # What a growing log leaves behind, its last chunk, has a segment of its own, which can be removed.
                if zeros or length < CHUNK or not group.make_room():
                    self._submit_chunks(log, group, is_stored)
                if zeros:
                    log.jobs.append(Ready(self._segments.zero_piece(zeros, self._owner)))
                    reader.skip(at, at + length)
                    continue
                raw = reader.read(at, length)
                if is_stored is None:
                    is_stored = at == 0 and is_compressed(raw[:MAGIC])
                group.chunks.append(raw)
                self._bytes += length
            self._submit_chunks(log, group, is_stored)

    def _submit_chunks(self, log: Log, group: Group, is_stored: bool | None) -> None:
        raws, number = group.chunks, log.planned.number
        if raws:
            job = self._submit(
                lambda slot: self._compress(slot, raws, (number, number), is_stored=is_stored),
                sum(map(len, raws)),
                alone=self._marks.suspects(number),
            )
            log.jobs.append(job)
            log.collect()
        group.clear()

    def _submit(self, work: Callable[[int], list[Piece]], size: int, *, alone: bool = False) -> Future[list[Piece]]:
        future = self._workers.submit(work, alone=alone)
        self._running.append(future)
        while self._running[0].done() and len(self._running) > 1:
            self._running.popleft()
        self._tell(size)
        return future

    def _compress(
        self, slot: int, raws: list[bytes], numbers: tuple[int, int], *, is_stored: bool | None = None
    ) -> list[Piece]:
        """In a worker: a piece for each of `raws`."""
        self._marks.begin(slot, *numbers)
        try:
            trace.point("seal.reading")
            return make_pieces(raws, self._known, self._segments, self._owner, is_stored=is_stored)
        finally:
            self._marks.end(slot)

    def _noter(self, planned: PlannedLog) -> Callable[[str], None]:
        return lambda reason: self._gap(planned, reason)

    def _gap(self, planned: PlannedLog, reason: str) -> None:
        self._gaps.add(Gap(printable(planned.path), reason))
