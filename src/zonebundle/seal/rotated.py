"""The rotated logs of a zone that runs, looked for again and again: what has not changed is not looked at.

A rename, a creation or a removal changes the stamps of its directory. So a directory that is as it was when all in it
was dealt with has nothing new, and the files in it are still there.
"""

from __future__ import annotations

import os
import stat
import time
from array import array
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zonebundle.errors import HostError, OutsideRootError
from zonebundle.host.files import MAX_DEPTH, MAX_DIRECTORIES, open_directory_beneath, open_root
from zonebundle.model.identity import FileIdentity
from zonebundle.model.zone import LogTree
from zonebundle.seal.plan import JOURNALS
from zonebundle.snapshots.families import arrange
from zonebundle.snapshots.links import is_suspect
from zonebundle.snapshots.listing import Listed
from zonebundle.snapshots.wanted import Wanted

# A directory with more logs is left to the seals: its names would have to be in memory at once.
_LISTED_AT_ONCE = 50_000

File = tuple[int, int]
"""A file to the index: file system (f_fsid) and inode."""


@dataclass(slots=True)
class Directory:
    """What is known of a directory since it was listed: the inodes of its rotated logs, the directories below it.

    `is_listed`: all of it was looked at, and a change since would show. `has_left`: something in it could not be dealt
    with yet, without any change to wait for.
    """

    stamp: FileIdentity
    filesystem: int
    inodes: array[int] = field(default_factory=lambda: array("Q"))
    below: tuple[str, ...] = ()
    is_listed: bool = False
    has_left: bool = False


@dataclass(frozen=True, slots=True)
class Rotated:
    """A rotated log that was found: its name in the open directory `descriptor`, whose owner is `owner`; its lstat."""

    directory: Directory
    descriptor: int
    owner: int
    name: str
    status: os.stat_result


class RotatedLogs:
    """The rotated logs of one log tree. After a look, `is_complete` says whether nothing was passed over for now."""

    def __init__(self, tree: LogTree) -> None:
        self.tree = tree
        self._wanted = Wanted(tree)
        self._known: dict[str, Directory] = {}
        self._has_looked = False
        # Where the tree is, whatever links lead there.
        self.place = Path(os.path.realpath(tree.path))
        self.is_complete = False
        self.has_changed = False

    def files(self) -> Iterator[File]:
        """All rotated logs that the looks have found and that are still there."""
        for directory in self._known.values():
            for inode in directory.inodes:
                yield directory.filesystem, inode

    @property
    def count(self) -> int:
        """How many `files` there are."""
        return sum(len(directory.inodes) for directory in self._known.values())

    def forget(self) -> None:
        """Look at everything the next time."""
        for directory in self._known.values():
            directory.has_left = True

    def look(self, room: int) -> Generator[Rotated, None, None]:
        """The rotated logs in the directories that have changed since they were done with; at most `room` in all.

        Each is to be dealt with before the next is asked for. Links are not followed, other mounts not entered. May
        block on a file system that hangs. Where it is ended early, it is not complete.
        """
        self.is_complete = False
        self.has_changed = not self._has_looked
        self._has_looked = True
        before, self._known = self._known, {}
        try:
            root = open_root(self.tree.path)
        except FileNotFoundError:
            self.is_complete = True
            self.has_changed |= bool(before)
            return
        except OSError:
            self._known = before
            return
        try:
            self.is_complete = yield from self._walk(root, before, room)
            self.has_changed |= bool(before)
        finally:
            os.close(root)
            if not self.is_complete:
                # What was not reached is taken to be as it was.
                self._known = before | self._known

    def _walk(self, root: int, before: dict[str, Directory], room: int) -> Generator[Rotated, None, bool]:
        """Every directory, breadth first; takes from `before` what it finds again. Whether it found all there is."""
        is_complete = True
        pending = deque((top, 0) for top in self._wanted.tops)
        while pending:
            path, depth = pending.popleft()
            try:
                descriptor = open_directory_beneath(root, path)
            except (FileNotFoundError, NotADirectoryError, OutsideRootError):
                # Gone, or behind a link or a mount by now.
                continue
            except (OSError, HostError):
                # What could never be read has no claims to end.
                is_complete = is_complete and path not in before
                continue
            try:
                yield from self._look_into(descriptor, path, before.get(path), room)
            except OSError:
                is_complete = False
                continue
            finally:
                os.close(descriptor)
            before.pop(path, None)
            directory = self._known[path]
            room -= len(directory.inodes)
            if depth < MAX_DEPTH and len(self._known) + len(pending) < MAX_DIRECTORIES:
                pending.extend((below, depth + 1) for below in directory.below)
        return is_complete

    def _look_into(self, descriptor: int, path: str, known: Directory | None, room: int) -> Iterator[Rotated]:
        now = time.time_ns()
        status = os.fstat(descriptor)
        # The device will do for an identity that is not kept.
        stamp = FileIdentity(status.st_dev, status.st_ino, 0, 0, status.st_mtime_ns, status.st_ctime_ns)
        if known is not None and known.is_listed and not known.has_left and known.stamp == stamp:
            self._known[path] = known
            return
        self.has_changed = True
        directory = Directory(stamp, os.fstatvfs(descriptor).f_fsid)
        # Until all of it was looked at, what was known counts as well.
        directory.inodes.extend(known.inodes if known is not None else ())
        self._known[path] = directory
        files, directory.below = self._list(descriptor, path)
        inodes = array("Q")
        for name in _rotated(status.st_dev, files)[:room]:
            try:
                found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(found.st_mode) and found.st_size and found.st_dev == status.st_dev:
                if is_suspect(found, status.st_uid):
                    continue
                inodes.append(found.st_ino)
                yield Rotated(directory, descriptor, status.st_uid, name, found)
        directory.inodes = inodes
        directory.is_listed = stamp.is_settled(now)

    def _list(self, descriptor: int, path: str) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
        """Names and inodes of the wanted files of a directory, and the directories in it that are worth a look."""
        prefix = f"{path}/" if path else ""
        is_covered = self._wanted.covers(path)
        files: list[tuple[str, int]] = []
        below: list[str] = []
        with os.scandir(descriptor) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if len(below) < MAX_DIRECTORIES and (is_covered or self._wanted.reaches(prefix + entry.name)):
                        below.append(prefix + entry.name)
                elif (
                    len(files) <= _LISTED_AT_ONCE
                    and (is_covered or self._wanted.matches(prefix + entry.name))
                    and entry.is_file(follow_symlinks=False)
                    and not entry.name.endswith(JOURNALS)
                ):
                    files.append((entry.name, entry.inode()))
        return ([] if len(files) > _LISTED_AT_ONCE else files), tuple(below)


def _rotated(device: int, files: list[tuple[str, int]]) -> list[str]:
    """The names of those files of a directory that are not the current one of their family."""
    families = arrange(Listed(0, name, (device, inode), None) for name, inode in files)
    return [file.path for family in families.values() for file in family.files if file.key != family.current]
