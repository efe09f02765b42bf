"""The agent's store directories: each belongs to one agent at a time, and is looked at before anything starts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import structlog

from zonebundle.errors import AlreadyRunningError, FormatError, StoreError, UnavailableError
from zonebundle.host.files import make_private_directory
from zonebundle.host.mounts import mount_of, read_mounts
from zonebundle.store.reader import read_format
from zonebundle.store.readers import StoreReaders
from zonebundle.store.store import prepare
from zonebundle.store.watch import Watch

_log = structlog.get_logger()

_LOCK_FILE = "agent.lock"


class StoreDirs:
    """The configured store directories. `readers` reads them."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.readers = StoreReaders(directories)
        self._watches = {one: Watch(one, alone=len(directories) == 1) for one in directories}
        # Resolved now: when a drain asks for them, what they lead through may be gone.
        self.resolved: dict[Path, str] = {}
        for directory, watch in self._watches.items():
            watch.resolve(partial(self.resolved.__setitem__, directory))
        self._locks: dict[Path, int] = {}

    def open(self, known: Mapping[str, str]) -> dict[str, str]:
        """Lock every directory that is there, and make a store in those that are new; returns what is known then.

        `known` is the mount point of every directory that has had a store. One that is empty now, and on another mount,
        has lost its disk: a new store there would only hide that. A directory that is away, or hangs, does not keep the
        agent from starting. Raises AlreadyRunningError if another agent has one, FormatError if one is of a newer
        version, UnavailableError if none can be used.
        """
        refused: dict[Path, UnavailableError] = {}
        found = dict(known)
        mounts = read_mounts()
        for directory, resolved in self.resolved.items():
            try:
                point = mount_of(resolved, mounts).point
                expected = known.get(str(directory), point)
                self._watches[directory].do(partial(self._open, directory, point, expected))
                found[str(directory)] = point
            except AlreadyRunningError:
                raise
            except FormatError:
                raise
            except (UnavailableError, StoreError) as error:
                refused[directory] = error if isinstance(error, UnavailableError) else _unusable(directory, str(error))
        if len(refused) == len(self.resolved):
            raise next(iter(refused.values()))
        for directory, reason in refused.items():
            _log.error("a store directory cannot be used", directory=str(directory), reason=str(reason))
        return found

    def _open(self, directory: Path, point: str, expected: str) -> None:
        if read_format(directory) is None and point != expected:
            raise _unusable(directory, f"it was on the file system mounted at {expected}, which is not there")
        try:
            make_private_directory(directory)
            usable = os.access(directory, os.R_OK | os.W_OK | os.X_OK)
            # access(2) says no without saying why.
            read_only = not usable and os.statvfs(directory).f_flag & os.ST_RDONLY
            reason = "the file system is mounted read-only" if read_only else "permission denied"
        except OSError as error:
            usable, reason = False, error.strerror or str(error)
        if not usable:
            raise _unusable(directory, reason)
        try:
            prepare(directory)
            self._lock(directory)
        except FormatError:
            raise
        except (StoreError, OSError) as error:
            raise _unusable(directory, str(error)) from None

    def _lock(self, directory: Path) -> None:
        lock = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise AlreadyRunningError(
                f"another agent uses the store {directory}: stop it, or set [store] dirs"
            ) from None
        self._locks[directory] = lock

    def are_all_there(self) -> bool:
        """Whether every directory has its store, so that what is not found is nowhere. Blocks."""
        try:
            watches = self._watches.items()
            return all(watch.do(partial(read_format, directory)) is not None for directory, watch in watches)
        except StoreError:
            return False

    def give_up(self, path: str) -> None:
        """Keep nothing open in the directories at or below a resolved path: their disk is to be removed."""
        for directory in self._below(path):
            if (lock := self._locks.pop(directory, None)) is not None:
                os.close(lock)

    def take_back(self, path: str) -> None:
        """Lock them again, as far as they are there. Blocks. What cannot be locked is logged: the sealer locks too."""
        for directory in self._below(path):
            if directory not in self._locks:
                try:
                    self._watches[directory].do(partial(self._lock, directory))
                except (OSError, StoreError, AlreadyRunningError) as error:
                    _log.error("a store directory cannot be used", directory=str(directory), reason=str(error))

    def _below(self, path: str) -> list[Path]:
        return [directory for directory, resolved in self.resolved.items() if Path(resolved).is_relative_to(path)]

    def close(self) -> None:
        """Give the directories up."""
        for lock in self._locks.values():
            os.close(lock)
        self._locks.clear()


def _unusable(directory: Path, reason: str) -> UnavailableError:
    return UnavailableError(
        f"the store {directory} cannot be written: {reason}; mount it or make it writable, or set [store] dirs"
    )
