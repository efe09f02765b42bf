"""The bytes of one log, from wherever its parts are: what cannot be read any more is zeros, and a gap.

Sizes are fixed in the record, so a log always gives exactly as many bytes as were recorded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from zonebundle.errors import HostError
from zonebundle.host import syscalls
from zonebundle.model.identity import FileIdentity
from zonebundle.model.record import LogFile, Part
from zonebundle.seal.areas import OpenAreas
from zonebundle.seal.live import SAMPLE, ChangedError, LiveLog
from zonebundle.store.pieces import CHUNK

# Our own lack of something says nothing about the log: the bundle is tried again.
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class _Source(NamedTuple):
    """A range of the log and where it is: at `shift` bytes more in `descriptor`, or nowhere (-1), for a reason."""

    start: int
    end: int
    descriptor: int
    shift: int = 0
    is_sparse: bool = False
    reason: str = ""


def read_whole(log: LogFile, areas: OpenAreas, note: Callable[[str], None]) -> tuple[bytes, FileIdentity | None]:
    """All that is kept of a small log, as LogReader would read it in one go, and the identity of what was read."""
    if len(log.parts) == 1 and log.parts[0].origin == "staged":
        # Of ten thousand files a second, nearly each is read here.
        part = log.parts[0]
        with contextlib.suppress(OSError):
            descriptor = areas.open(part)
            try:
                identity = identify(descriptor, log)
                raw = os.pread(descriptor, part.length, part.offset)
                if len(raw) == part.length and not _was_written_to(descriptor, log):
                    return raw, _unchanged(descriptor, log, identity)
            finally:
                os.close(descriptor)
    # Again, with all that can be said about what is wrong.
    with LogReader(log, areas, note) as reader:
        raw = reader.read(log.first, log.size - log.first)
    return raw, reader.identity


class LogReader:
    """One log, opened; a context manager. `note` is told each reason for which something of it is missing.

    Raises OSError only where the host as a whole is short of something, and SealError as OpenAreas does.
    """

    def __init__(self, log: LogFile, areas: OpenAreas, note: Callable[[str], None]) -> None:
        self._log = log
        self._areas = areas
        self._note = note
        self._lost: dict[str, int] = {}
        self._live: list[LiveLog] = []
        self._sources: list[_Source] = []
        # Of what is read: certain when the context has ended.
        self.identity: FileIdentity | None = None

    def __enter__(self) -> Self:
        try:
            for index, part in enumerate(self._log.parts):
                self._sources.append(self._open(index, part))
            if _is_one_file(self._log) and self._sources[0].descriptor >= 0:
                self.identity = identify(self._sources[0].descriptor, self._log)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._look_for_changes()
                if self.identity is not None:
                    self.identity = _unchanged(self._sources[0].descriptor, self._log, self.identity)
                if self._lost:
                    self.identity = None
                for reason, length in self._lost.items():
                    self._note(f"{reason}: {length} bytes are zeros" if length else reason)
        finally:
            self._close()

    def _close(self) -> None:
        for live in self._live:
            live.close()
        for source, part in zip(self._sources, self._log.parts, strict=False):
            if part.origin == "staged" and source.descriptor >= 0:
                os.close(source.descriptor)
        self._live.clear()
        self._sources.clear()

    def _open(self, index: int, part: Part) -> _Source:
        start, end = part.start, part.start + part.length
        try:
            if part.origin == "live":
                live = LiveLog(self._log, part, self._sample_after(index))
                self._live.append(live)
                descriptor, shift = live.descriptor, 0
            else:
                descriptor, shift = self._areas.open(part), part.offset - part.start
        except (OSError, HostError, ChangedError) as error:
            return _Source(start, end, -1, reason=_reason(error))
        return _Source(start, end, descriptor, shift, part.length >= CHUNK and has_holes(os.fstat(descriptor)))

    def _sample_after(self, index: int) -> bytes:
        if index + 1 >= len(self._log.parts) or self._log.parts[index + 1].origin == "live":
            return b""
        part = self._log.parts[index + 1]
        descriptor = self._areas.open(part)
        try:
            return os.pread(descriptor, min(SAMPLE, part.length), part.offset)
        finally:
            os.close(descriptor)

    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes of the log from `start` on."""
        source = self._sources[0]
        if source.start <= start and start + length <= source.end and source.descriptor >= 0:
            # Nearly always: one part, that gives all of it in one read.
            try:
                raw = os.pread(source.descriptor, length, start + source.shift)
                if len(raw) == length:
                    return raw
            except OSError as error:
                _raise_if_ours(error)
        return self._read_piecewise(start, length)

    def _read_piecewise(self, start: int, length: int) -> bytes:
        raw = bytearray(length)
        view = memoryview(raw)
        for source in self._sources:
            at, end = max(start, source.start), min(start + length, source.end)
            while at < end:
                count, reason = _read_into(source, at, view[at - start : end - start])
                if not count:
                    self._lose(reason, end - at)
                    break
                at += count
        return bytes(raw)

    def next_data(self, offset: int) -> int:
        """The first byte from `offset` on that is not known to be in a hole, or out of reach; at most the size."""
        for source in self._sources:
            at = max(offset, source.start)
            if at >= source.end:
                continue
            if source.descriptor >= 0:
                found = _seek_data(source, at)
                if found < source.end:
                    return found
        return self._log.size

    def skip(self, start: int, end: int) -> None:
        """Account for a range that `next_data` led over: a hole loses nothing, what is out of reach does."""
        for source in self._sources:
            length = min(end, source.end) - max(start, source.start)
            if source.descriptor < 0 and length > 0:
                self._lose(source.reason, length)

    def _lose(self, reason: str, length: int = 0) -> None:
        self._lost[reason] = self._lost.get(reason, 0) + length

    def _look_for_changes(self) -> None:
        for live in self._live:
            if reason := live.check():
                self._lose(f"{reason}; the bytes are as they were found")
        for source, part in zip(self._sources, self._log.parts, strict=True):
            is_staged = part.origin == "staged" and source.descriptor >= 0
            if is_staged and _was_written_to(source.descriptor, self._log):
                self._lose("was written to after the hold; the bytes are as they were found")


def identify(descriptor: int, log: LogFile) -> FileIdentity | None:
    """The identity of a staged log as it is now, None if it is not certain, or not all of the log.

    A reflink, a copy or a file in a snapshot is what was recorded. A link is the log itself, in the state in which our
    link has left it, or somebody else since.
    """
    if log.identity is None or log.first or not _is_one_file(log):
        return None
    status = os.fstat(descriptor)
    if not is_link(status, log):
        return log.identity
    if (status.st_size, status.st_mtime_ns) != (log.size, log.mtime_ns):
        return None
    born = syscalls.birth_time_ns(descriptor)
    now = FileIdentity(log.identity.filesystem, log.inode, born, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return now if now.is_settled(time.time_ns()) else None


def is_link(status: os.stat_result, log: LogFile) -> bool:
    """Whether a staged file is the log itself. A copy or clone has one link, and may have any inode number."""
    return status.st_nlink > 1 and status.st_ino == log.inode


def _is_one_file(log: LogFile) -> bool:
    return len(log.parts) == 1 and log.parts[0].origin == "staged"


def _unchanged(descriptor: int, log: LogFile, identity: FileIdentity | None) -> FileIdentity | None:
    """The identity that was taken before the read, if it is still that."""
    if identity is None or identity is log.identity:
        return identity
    status = os.fstat(descriptor)
    is_same = (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == (
        identity.size,
        identity.mtime_ns,
        identity.ctime_ns,
    )
    return identity if is_same else None


def _read_into(source: _Source, at: int, view: memoryview) -> tuple[int, str]:
    """How many bytes were read, and where it is none, why."""
    if source.descriptor < 0:
        return 0, source.reason
    try:
        count = os.preadv(source.descriptor, [view], at + source.shift)
    except OSError as error:
        _raise_if_ours(error)
        return 0, f"cannot be read: {error.strerror}"
    return count, "is shorter than it was in the hold"


def _seek_data(source: _Source, at: int) -> int:
    if not source.is_sparse:
        return at
    return next_data(source.descriptor, at + source.shift, source.end + source.shift) - source.shift


def next_data(descriptor: int, at: int, end: int) -> int:
    """The first byte of a file from `at` on that is not known to be in a hole; `end` if there is none."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:
        # ENXIO: nothing but a hole up to the end of the file.
        return end if error.errno == errno.ENXIO else at


def _was_written_to(descriptor: int, log: LogFile) -> bool:
    status = os.fstat(descriptor)
    return is_link(status, log) and status.st_mtime_ns != log.mtime_ns


def has_holes(status: os.stat_result) -> bool:
    """Whether a file has fewer blocks than its size takes."""
    return status.st_blocks * 512 < status.st_size


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        _raise_if_ours(error)
        return f"cannot be opened: {error.strerror}"
    return str(error)


def _raise_if_ours(error: OSError) -> None:
    if error.errno in _OURS:
        raise error
