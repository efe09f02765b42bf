"""Ranges of logs that were not staged: read from the log itself, if it is still the same.

The zone may run on, or run again, and its logs are rotated, truncated or removed meanwhile. What is not certainly the
recorded log is not read; what may have changed is told.
"""

from __future__ import annotations

import contextlib
import os

from zonebundle.errors import HostError, NotRegularFileError
from zonebundle.host.files import open_directory_beneath, open_regular_beneath, open_root
from zonebundle.model.record import LogFile, Part

# Of the staged bytes that follow a live range, as many are compared with the log at its place.
SAMPLE = 64 << 10


class ChangedError(Exception):
    """The log is not there any more, or is another one; the message says what happened to it."""


class LiveLog:
    """A log at its place on the host, found by its inode. `descriptor` is open until `close`.

    `sample` is what was staged of it from the end of the range on, empty where nothing was: a log that was truncated
    and written again is told by it.
    """

    def __init__(self, log: LogFile, part: Part, sample: bytes) -> None:
        """Find and check it. Raises ChangedError, OSError, HostError. May block on a file system that hangs."""
        self._log = log
        self._end = part.start + part.length
        self._sample = sample
        self.descriptor, self._status = _find(log)
        try:
            if reason := self._difference():
                raise ChangedError(reason)
        except BaseException:
            self.close()
            raise

    def check(self) -> str:
        """What happened to the log since the record, empty if nothing: a doubt about bytes that have been read."""
        if reason := self._difference():
            return f"{reason} while it was read"
        status = os.fstat(self.descriptor)
        if not self._sample and status.st_size == self._log.size and status.st_mtime_ns != self._log.mtime_ns:
            return "was written to after the hold, without growing"
        return ""

    def _difference(self) -> str:
        if os.fstat(self.descriptor).st_size < self._end:
            return "was truncated after the hold"
        if self._sample and os.pread(self.descriptor, len(self._sample), self._end) != self._sample:
            return "was truncated and written again after the hold"
        return ""

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _find(log: LogFile) -> tuple[int, os.stat_result]:
    if not os.path.isabs(log.host_root):
        raise ChangedError("was in a mount of the zone's own, and could not be staged before that was gone")
    root = open_root(log.host_root)
    try:
        path = _below_root(log)
        with contextlib.suppress(FileNotFoundError, NotRegularFileError):
            descriptor, status = open_regular_beneath(root, path)
            if status.st_ino == log.inode:
                return descriptor, status
            os.close(descriptor)
        # Rotated: another name in the same directory, but the same inode.
        directory = os.path.dirname(path)
        for name in _names(root, directory, log.inode):
            with contextlib.suppress(FileNotFoundError, NotRegularFileError):
                descriptor, status = open_regular_beneath(root, os.path.join(directory, name))
                if status.st_ino == log.inode:
                    return descriptor, status
                os.close(descriptor)
    finally:
        os.close(root)
    raise ChangedError("was removed, or moved to another directory, after the hold")


def _names(root: int, directory: str, inode: int) -> list[str]:
    descriptor = open_directory_beneath(root, directory)
    try:
        with os.scandir(descriptor) as entries:
            return [entry.name for entry in entries if entry.inode() == inode]
    finally:
        os.close(descriptor)


def _below_root(log: LogFile) -> str:
    path = os.fsdecode(log.host_path)
    if not path.startswith("/"):
        return path
    below = os.path.relpath(path, log.host_root)
    if below.startswith("../"):
        raise HostError(f"{log.host_root} is not above it")
    return below
