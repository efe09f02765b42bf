"""Lists the wanted files of a log tree, fast and bounded, again and again while they are rotated.

The first listing takes each file's stat; a later one asks for a stat only where the inode is new, because a directory
tells names and inode numbers by itself. None is needed where the directories' own stamps say that it would be the same.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Final

from zonebundle.host import syscalls
from zonebundle.host.files import MAX_DEPTH, describe_kind
from zonebundle.model.identity import are_settled
from zonebundle.model.zone import LogTree
from zonebundle.snapshots.wanted import Wanted

# (st_dev, st_ino): a tree may span btrfs subvolumes, each with its own numbers.
Key = tuple[int, int]

# Device, inode, ctime.
_State = tuple[int, int, int]

# Collected through journalctl only: the files are binary, and half written while journald lives.
_JOURNAL: Final = (".journal", ".journal~")
_JOURNALS: Final = "journal file"
_FILES_A_LOOK = 512
# Not O_NOFOLLOW: with it a link in the last place is ENOTDIR, like a mere file; RESOLVE_NO_SYMLINKS makes it ELOOP.
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK
_BENEATH = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)


@dataclass(slots=True)
class Listed:
    """A wanted regular file: the number of its tree, its path below it, its identity.

    `status` is its lstat, None if its key was known already.
    """

    tree: int
    path: str
    key: Key
    status: os.stat_result | None


@dataclass(slots=True)
class Listing:
    """What one pass over a tree found. `lost` maps paths to the reasons why they could not be looked into.

    `skipped` counts what is no log, by what it is; `is_complete` is False if time ran out.
    """

    files: list[Listed] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    is_complete: bool = True

    def skip(self, kind: str) -> None:
        self.skipped[kind] = self.skipped.get(kind, 0) + 1


class TreeListing:
    """Lists one tree, as often as needed, through the descriptor of its directory."""

    def __init__(self, number: int, tree: LogTree, root: int) -> None:
        self._number = number
        self._root = root
        self._wanted = Wanted(tree)
        self._is_foreign = tree.via is not None
        # On overlay, and where a file is itself a mount, the directory's inode numbers are not those of stat.
        self._are_numbers_true = True
        # By directory, its state before it was listed last; None if that does not tell of every later change.
        self._states: dict[str, _State | None] = {}
        self._is_whole = False

    def look(self, known: Container[Key], is_over: Callable[[], bool]) -> Listing:
        """Every wanted file, breadth first. A directory that cannot be read costs only itself.

        Links are not followed. Other mounts are not entered: whoever opened the tree opens them as trees of their own;
        only in the namespace of another process (`LogTree.via`) they count as lost. Nested btrfs subvolumes are no
        mounts and are entered. Directories below which nothing can be wanted are not opened. Ends early, incomplete,
        when `is_over`. May block on a file system that hangs.
        """
        listing = Listing()
        known = known if self._are_numbers_true else ()
        self._states.clear()
        self._is_whole = True
        pending = deque((top, 0) for top in self._wanted.tops)
        while pending:
            directory, depth = pending.popleft()
            if is_over():
                listing.is_complete = False
                break
            try:
                descriptor = self._open(directory)
            except OSError as error:
                self._refuse(listing, directory, error)
                continue
            try:
                below = self._list_directory(listing, descriptor, directory, known, is_over)
            except OSError as error:
                listing.lost[directory] = f"cannot be listed: {error.strerror}"
                continue
            finally:
                os.close(descriptor)
            if depth < MAX_DEPTH:
                pending.extend((path, depth + 1) for path in below)
            else:
                listing.lost.update((path, f"is deeper than {MAX_DEPTH} directories") for path in below)
        self._is_whole &= listing.is_complete and not listing.lost
        return listing

    def is_unchanged(self, is_over: Callable[[], bool]) -> bool:
        """Whether another look would find the names and inodes of the last one; False where that cannot be told.

        Whatever changes an entry of a directory changes its ctime, which only the kernel's clock sets. A ctime that
        was settled before the directory was listed shows every change since, as for a file's identity.
        """
        if not self._is_whole:
            return False
        for directory, before in self._states.items():
            if before is None or is_over():
                return False
            try:
                descriptor = self._open(directory)
            except OSError:
                return False
            try:
                now = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if (now.st_dev, now.st_ino, now.st_ctime_ns) != before:
                return False
        return True

    def _open(self, directory: str) -> int:
        return syscalls.openat2(self._root, os.fsencode(directory or "."), _DIRECTORY, _BENEATH)

    def _refuse(self, listing: Listing, directory: str, error: OSError) -> None:
        # It may be reached later without a change of any directory: by an unmount, by new permissions.
        self._is_whole = False
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            # It may vanish while the zone lives; then there is nothing to lose.
            return
        if error.errno == errno.EXDEV and not self._is_foreign:
            listing.skip("mount")
        elif error.errno == errno.EXDEV:
            listing.lost[directory] = "is another mount, which is not entered"
        elif error.errno == errno.ELOOP:
            listing.lost[directory] = "is behind a symbolic link, which is not followed"
        else:
            listing.lost[directory] = f"cannot be opened: {error.strerror}"

    def _list_directory(
        self,
        listing: Listing,
        descriptor: int,
        directory: str,
        known: Container[Key],
        is_over: Callable[[], bool],
    ) -> list[str]:
        """Add the files of one directory to the listing; returns the directories in it that are worth a look."""
        prefix = f"{directory}/" if directory else ""
        is_covered = self._wanted.covers(directory)
        matches, files = self._wanted.matches, listing.files
        status = os.fstat(descriptor)
        device = status.st_dev
        self._states[directory] = _state(status)
        below: list[str] = []
        with os.scandir(descriptor) as entries:
            for number, entry in enumerate(entries, start=1):
                if number % _FILES_A_LOOK == 0 and is_over():
                    listing.is_complete = False
                    break
                path = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if is_covered or self._wanted.reaches(path):
                        below.append(path)
                    continue
                if not is_covered and not matches(path):
                    continue
                if not entry.is_file(follow_symlinks=False):
                    _skip_other(listing, entry)
                    continue
                if path.endswith(_JOURNAL):
                    listing.skip(_JOURNALS)
                    continue
                key = (device, entry.inode())
                if key in known:
                    files.append(Listed(self._number, path, key, None))
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if not stat.S_ISREG(status.st_mode):
                    listing.skip(describe_kind(status.st_mode))
                    continue
                if (status.st_dev, status.st_ino) != key:
                    self._are_numbers_true = False
                    key = (status.st_dev, status.st_ino)
                files.append(Listed(self._number, path, key, status))
        return below


def _state(directory: os.stat_result) -> _State | None:
    """The state of a directory that is about to be listed, if its ctime is old enough to show every later change."""
    ctime = directory.st_ctime_ns
    return (directory.st_dev, directory.st_ino, ctime) if are_settled(ctime, ctime, time.time_ns()) else None


def _skip_other(listing: Listing, entry: os.DirEntry[str]) -> None:
    try:
        listing.skip(describe_kind(entry.stat(follow_symlinks=False).st_mode))
    except FileNotFoundError:
        return
