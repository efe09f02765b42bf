"""Durable writes, and a walk and an open that can be turned loose on a hostile directory.

Reading below a root uses openat2 with RESOLVE_BENEATH, NO_SYMLINKS, NO_MAGICLINKS and NO_XDEV: the kernel resolves the
whole path in one call and refuses links in any component, even ones swapped in while it looks. A file is first opened
with O_PATH, which touches neither a FIFO's peer nor a device's driver, and reopened for reading only when fstat says
that it is a regular file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zonebundle.errors import HostError, NotRegularFileError, OutsideRootError
from zonebundle.host import syscalls

_BENEATH = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)
MAX_DEPTH = 64
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)
# Bounds the memory of a walk: a zone may make directories as fast as they are listed.
MAX_DIRECTORIES = 200_000

_KINDS = {
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFDIR: "directory",
}


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte of `data`; a short write (a disk that fills) is continued until the kernel says why."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`, so that after a crash either the old or the new content is there, whole.

    Temporary name, write, length check, fsync, rename, fsync of the directory. Raises OSError; leaves no temporary.
    """
    # Two threads that write the same file must not share it; one left by a crash is overwritten some day.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            write_all(descriptor, data)
            if os.fstat(descriptor).st_size != len(data):
                raise OSError(errno.EIO, "the file is not as long as what was written", str(temporary))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def preallocate(path: Path, size: int) -> None:
    """Make sure that a file of `size` bytes has its space on the disk, whatever is in it.

    Raises OSError; then it has no more than it had.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        before = os.fstat(descriptor).st_size
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            # ext4 keeps what it got: all that was left, and that others need.
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Remove what durable writes into a directory left when they were killed. Only while nobody else writes there."""
    for name in os.listdir(directory):
        if _TEMPORARY.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(directory / name)


def sync_directory(path: Path | str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private_directory(path: Path) -> None:
    """Create a directory 0700 and its parents if they are missing."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def open_root(path: str) -> int:
    """A descriptor of a directory that the operator named; only its last component may not be a link."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def open_directory_beneath(root: int, path: str, *, cross_mounts: bool = False) -> int:
    """Open the directory `path` below the descriptor `root` (itself, if empty), never leaving it.

    Raises OutsideRootError if a component is a link or (unless `cross_mounts`) another mount, OSError for the rest.
    """
    resolve = _BENEATH & ~syscalls.RESOLVE_NO_XDEV if cross_mounts else _BENEATH
    try:
        return syscalls.openat2(
            root,
            os.fsencode(path or "."),
            # Not O_NOFOLLOW: with it a link in the last place looks like a mere file (ENOTDIR) instead of a link.
            os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK,
            resolve,
        )
    except OSError as error:
        raise _explain(error, path) from None


def open_regular_beneath(root: int, path: str) -> tuple[int, os.stat_result]:
    """Open the regular file `path` below the descriptor `root` for reading, with its fstat.

    Never follows a link, never leaves the root or its mount, never blocks on a FIFO, never touches a device.
    Raises NotRegularFileError, OutsideRootError or OSError. The caller closes the descriptor.
    """
    try:
        handle = syscalls.openat2(root, os.fsencode(path), os.O_PATH | os.O_NOFOLLOW, _BENEATH)
    except OSError as error:
        raise _explain(error, path) from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise NotRegularFileError(f"{path!r} is a {describe_kind(status.st_mode)}, not a regular file")
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        # Through /proc it is the very inode that was looked at, whatever its name points to by now.
        return os.open(f"/proc/self/fd/{handle}", flags), status
    finally:
        os.close(handle)


def _explain(error: OSError, path: str) -> OSError | OutsideRootError:
    if error.errno == errno.ELOOP:
        return OutsideRootError(f"{path!r} leads through a symbolic link; links are not followed")
    if error.errno == errno.EXDEV:
        return OutsideRootError(f"{path!r} leads out of its root or into another mount; it is not entered")
    return error


def describe_kind(mode: int) -> str:
    """What a file of this st_mode is, in words."""
    return _KINDS.get(stat.S_IFMT(mode), "file of unknown kind")


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file below a root: its relative path (surrogate-escaped) and its lstat."""

    path: str
    status: os.stat_result


@dataclass(frozen=True, slots=True)
class Passed:
    """Something below a root that is not entered or read. `lost` tells a gap (evidence) from a mere skip."""

    path: str
    reason: str
    lost: bool


def walk_beneath(root: int, top: str = "") -> Iterator[Found | Passed]:
    """Every regular file below `top` in the directory `root`, breadth first, one directory at a time.

    Links are not followed, other mounts are not entered, nothing is opened but directories. Problems are yielded, not
    raised, so that one bad directory does not cost the rest; only a missing `top` raises FileNotFoundError. May block
    on a file system that hangs: run it where it can be abandoned.
    """
    pending = deque([(top, 0)])
    entered = 0
    while pending:
        entered += 1
        if entered > MAX_DIRECTORIES:
            yield Passed(
                top, f"more than {MAX_DIRECTORIES} directories; {len(pending)} or more are left out", lost=True
            )
            return
        directory, depth = pending.popleft()
        try:
            descriptor = open_directory_beneath(root, directory)
        except (OSError, HostError) as error:
            if directory == top and isinstance(error, FileNotFoundError):
                raise
            # A directory may vanish while a zone lives; then there is nothing to lose.
            if not isinstance(error, FileNotFoundError):
                yield Passed(directory, str(error), lost=True)
            continue
        try:
            yield from _list(descriptor, directory, depth, pending)
        finally:
            os.close(descriptor)


def _list(descriptor: int, directory: str, depth: int, pending: deque[tuple[str, int]]) -> Iterator[Found | Passed]:
    prefix = f"{directory}/" if directory else ""
    try:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                path = prefix + entry.name
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    yield Passed(path, str(error), lost=True)
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield Found(path, status)
                elif stat.S_ISDIR(status.st_mode):
                    if depth >= MAX_DEPTH:
                        yield Passed(path, f"directory deeper than {MAX_DEPTH} levels", lost=True)
                    elif len(pending) < MAX_DIRECTORIES:
                        pending.append((path, depth + 1))
                    else:
                        yield Passed(path, f"more than {MAX_DIRECTORIES} directories", lost=True)
                else:
                    yield Passed(path, f"is a {describe_kind(status.st_mode)}", lost=False)
    except OSError as error:
        yield Passed(directory, f"listing failed: {error.strerror}", lost=True)


def remove_tree(path: Path) -> None:
    """Remove a directory of ours with all it holds, never following a link; a missing one is fine."""
    # shutil.rmtree works relative to directory descriptors on Linux, so a link swapped in is not followed.
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
