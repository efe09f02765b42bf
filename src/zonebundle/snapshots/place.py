"""Brings one open log into an area: by reflink, by hard link, or by copying its newest bytes.

Every file gets a number in the area's `files/`; all copies of one staging share a single file, as creating one costs
more than copying a small log.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zonebundle.host import syscalls
from zonebundle.model.identity import TRUSTED_AGE_NS
from zonebundle.model.record import Part
from zonebundle.snapshots import btrfs
from zonebundle.snapshots.base import KnownFile

FILES: Final = "files"
# linux/fs.h: _IOW(0x94, 9, int)
FICLONE: Final = 0x40049409

# A plain number, which fcntl takes in a third of the time.
_IGNORED = int(signal.SIGURG)
_CHUNK = 1 << 20
_SAMPLE = 4096
_TRIES = 5
_SYNCERS = 8
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class RewrittenError(Exception):
    """A log was truncated or rewritten each time that it was copied."""


@dataclass(slots=True)
class Placed:
    """A log as it was staged: its size, its mtime (ns) no later than its last staged byte, and where its bytes are.

    `is_link`: it is the log itself, by a second name. `known`: it was not staged, because the store has it; there are
    no parts then. Not frozen, because there is one for each log of a hold, and making that would take twice as long.
    """

    size: int
    mtime_ns: int
    parts: tuple[Part, ...] = ()
    is_link: bool = False
    known: KnownFile | None = None


def is_unwritten(descriptor: int) -> bool:
    """Whether nobody on the host has the file open for writing; False where that cannot be told.

    A read lease is granted only then (fcntl(2), F_SETLEASE), to the file's owner or with CAP_LEASE. It is given back at
    once. Somebody who opens the file in that microsecond makes the kernel signal us: SIGIO would end the process, so
    it is asked for one that is ignored.
    """
    control = fcntl.fcntl
    try:
        control(descriptor, fcntl.F_SETSIG, _IGNORED)
        control(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    control(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


class AreaFiles:
    """The `files/` of a prepared area, being filled. Used by one thread.

    `number` is the area's in the record; `copy_limit` bounds the bytes that are copied of one log, `file_limit` those
    that are kept of one: the newest in both cases. `is_late` says that time is up: a copy then ends with the chunk.
    """

    def __init__(
        self, area: Path, number: int, *, copy_limit: int, file_limit: int, is_late: Callable[[], bool]
    ) -> None:
        """Raises OSError if the area cannot be opened."""
        self._number = number
        self._copy_limit = copy_limit
        self._file_limit = file_limit
        self._is_late = is_late
        self._pack = -1
        self._pack_name = ""
        self._pack_size = 0
        self._buffer = bytearray()
        self._next = 0
        self._area = os.open(area, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._files = -1
        try:
            try:
                os.mkdir(FILES, 0o700, dir_fd=self._area)
                is_new = True
            except FileExistsError:
                is_new = False
            self._files = os.open(FILES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._area)
            if not is_new:
                self._next = 1 + max((int(name) for name in os.listdir(self._files)), default=-1)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for descriptor in (self._pack, self._files, self._area):
            if descriptor >= 0:
                os.close(descriptor)
        self._pack = self._files = self._area = -1

    def clone(self, source: int, status: os.stat_result) -> Placed:
        """Share the log's blocks: one instant of it, whoever writes on. Raises OSError; nothing is left then."""
        name = str(self._next)
        target = os.open(name, _CREATE, 0o600, dir_fd=self._files)
        self._next += 1
        try:
            fcntl.ioctl(target, FICLONE, source)
            size = os.fstat(target).st_size
        except OSError:
            os.unlink(name, dir_fd=self._files)
            raise
        finally:
            os.close(target)
        return Placed(size, status.st_mtime_ns, self._whole(size, name))

    def link(self, source: int, status: os.stat_result) -> Placed:
        """Give the log a second name. Later changes of it show in the area. Raises OSError."""
        name = str(self._next)
        try:
            syscalls.link_open_file(source, self._files, name.encode("ascii"))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            # Not permitted to us by the descriptor alone. With a directory's descriptor given, Python uses linkat with
            # AT_SYMLINK_FOLLOW: this, too, is the very inode opened.
            os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=self._files)
        self._next += 1
        size = status.st_size
        return Placed(size, status.st_mtime_ns, self._whole(size, name), True)

    def copy(self, source: int, status: os.stat_result) -> Placed:
        """Copy the newest bytes, as many as the limit allows and until it is late; older ones are parts read live.

        A log that was truncated meanwhile (copied and truncated by a rotation) is copied again, at most 5 times; then
        raises RewrittenError. Raises OSError.
        """
        for _ in range(_TRIES):
            placed = self._copy_once(source, status)
            if placed is not None:
                return placed
            status = os.fstat(source)
        raise RewrittenError(f"it was truncated or rewritten each of the {_TRIES} times that it was copied")

    def _copy_once(self, source: int, status: os.stat_result) -> Placed | None:
        size = status.st_size
        kept = max(0, size - self._file_limit)
        first = max(kept, size - self._copy_limit)
        if first == size:
            return Placed(size, status.st_mtime_ns, live_parts(kept, size))
        self._open_pack()
        # Where the log's byte 0 would be in the pack. The space is used up even if the attempt fails: nothing is
        # written twice, so a hole in the pack is a hole in the log.
        shift = self._pack_size - first
        self._pack_size = size + shift
        is_sparse = status.st_blocks * 512 < size
        if len(self._buffer) < min(size - first, _CHUNK):
            self._buffer = bytearray(min(size - first, _CHUNK))
        if size - first >= _CHUNK and not is_sparse:
            # Blocks that are there already are written to in 80 % of the time that it takes to give each page its own.
            syscalls.fallocate(self._pack, first + shift, size - first)
        sample, sample_at = b"", 0
        start = size
        # Backwards, so that the newest bytes are there if time runs out.
        while start > first and (start == size or not self._is_late()):
            begin = max(first, start - _CHUNK)
            if not (is_sparse and _is_hole(source, begin, start)):
                view = memoryview(self._buffer)[: start - begin]
                if not _copy_range(source, self._pack, begin, begin + shift, view):
                    return None
                if not sample:
                    sample, sample_at = bytes(view[:_SAMPLE]), begin
            start = begin
        if is_sparse:
            os.ftruncate(self._pack, size + shift)
        if not _is_unchanged(source, status, sample, sample_at):
            return None
        staged = Part(start, size - start, "staged", self._number, f"{FILES}/{self._pack_name}", start + shift)
        return Placed(size, status.st_mtime_ns, (*live_parts(kept, start), staged))

    def _open_pack(self) -> None:
        if self._pack < 0:
            self._pack_name = str(self._next)
            self._pack = os.open(self._pack_name, _CREATE, 0o600, dir_fd=self._files)
            self._next += 1

    def continues(self, source: int, part: Part) -> bool:
        """Whether the end of what was staged of a log is still there in it: then it only grew since."""
        length = min(_SAMPLE, part.length)
        at = part.length - length
        if part.origin == "live":
            return os.fstat(source).st_size >= part.start + part.length
        staged = os.open(part.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._area)
        try:
            return os.pread(staged, length, part.offset + at) == os.pread(source, length, part.start + at)
        finally:
            os.close(staged)

    def _whole(self, size: int, name: str) -> tuple[Part, ...]:
        first = max(0, size - self._file_limit)
        if first == size:
            return ()
        return (Part(first, size - first, "staged", self._number, f"{FILES}/{name}", first),)

    def sync(self) -> None:
        """Make everything in the area durable, and the area's name. Raises OSError."""
        if self._pack >= 0:
            os.fsync(self._pack)
        try:
            btrfs.commit(self._files)
        except OSError:
            _sync_each(os.listdir(self._files), self._files)
        os.fsync(self._files)
        os.fsync(self._area)
        parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._area)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def live_parts(first: int, end: int) -> tuple[Part, ...]:
    """A range that is read behind from the log at its place, if it is not empty."""
    return (Part(first, end - first, "live"),) if end > first else ()


def _copy_range(source: int, target: int, start: int, at: int, view: memoryview) -> bool:
    """Copy as many bytes as `view` has from `start` to `at`; False if the source ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(source, [view[done:]], start + done)
        if not count:
            return False
        done += count
    while view:
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count
    return True


def _is_hole(source: int, start: int, end: int) -> bool:
    try:
        return os.lseek(source, start, os.SEEK_DATA) >= end
    except OSError as error:
        # ENXIO: nothing but a hole to the end of the file. Others: holes cannot be told here.
        return error.errno == errno.ENXIO


def _is_unchanged(source: int, status: os.stat_result, sample: bytes, at: int) -> bool:
    """Whether what was copied since `status` is of one generation: growth is fine, truncation is not.

    `sample` was copied first: if it is still in its place, nothing was truncated up to now.
    """
    now = os.fstat(source)
    if now.st_size < status.st_size:
        return False
    if now.st_mtime_ns == status.st_mtime_ns and time.time_ns() - now.st_mtime_ns > TRUSTED_AGE_NS:
        return True
    return os.pread(source, len(sample), at) == sample


def _sync_each(names: list[str], directory: int) -> None:
    # Each fsync of a linked or cloned file waits for a flush of the disk; side by side they share it (200 files: 24 ms
    # one by one, 7 ms by eight). syncfs would be quicker still, and wait for the dirty data of everybody else.
    remaining = iter(names)
    errors: list[OSError] = []

    def work() -> None:
        try:
            for name in remaining:
                _sync(name, directory)
        except OSError as error:
            errors.append(error)

    _run_beside(work, min(_SYNCERS, len(names)) - 1)
    if errors:
        raise errors[0]


def _run_beside(work: Callable[[], None], others: int) -> None:
    threads = [threading.Thread(target=work, name="sync", daemon=True) for _ in range(others)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()


def _sync(name: str, directory: int) -> None:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
