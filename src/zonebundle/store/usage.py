"""What a store directory uses on disk, and what it may: the numbers that the clean-up goes by.

Quotas are asked of the kernel, each where it tells them:

* Project quotas (XFS, ext4) show in statvfs(2) of a directory that hands its project down (FS_XFLAG_PROJINHERIT): its
  f_blocks is the project's limit (the soft one, if there is one) instead of the file system's size. A plain file never
  carries that flag, so its statvfs tells of the whole file system; where both are the same, no limit applies. Unlike a
  look at the mount point, this holds through bind mounts. Limits of users and groups do not count.
* ZFS: f_blocks is what the dataset holds and may still get, which is its quota where it has one.
* btrfs: limits of the subvolume's qgroup, and of those above it, are items of the quota tree. Structures and numbers
  are from the kernel's uapi headers linux/btrfs.h and linux/btrfs_tree.h. Only root may read them.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zonebundle.host import syscalls
from zonebundle.host.mounts import mount_id_of, read_mounts
from zonebundle.store.failure import store_errors

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# stat(2): st_blocks counts these, whatever the file system's own blocks are.
_BLOCK: Final = 512

_FS_GET_XATTR = 0x801C581F
_PROJECT_INHERITED = 0x200

_INO_LOOKUP = 0xD0009412
_TREE_SEARCH = 0xD0009411
_ARGUMENT = 4096
_FIRST_FREE_OBJECTID = 256
_QUOTA_TREE = 8
_QGROUP_LIMIT = 244
_QGROUP_RELATION = 246
_LEVEL_SHIFT = 48
_MAX_REFERENCED = 1 << 0
_MAX_EXCLUSIVE = 1 << 1
_ANY = (1 << 64) - 1
_SEARCH_KEY = struct.Struct("=7Q4I4Q")
_SEARCH_HEADER = struct.Struct("=3Q2I")


@dataclass(frozen=True, slots=True)
class Usage:
    """Omicron's three numbers of a directory, in bytes."""

    dataset_quota: int
    bytes_available: int
    bytes_used: int

    def to_json(self) -> dict[str, int]:
        return {
            "dataset_quota": self.dataset_quota,
            "bytes_available": self.bytes_available,
            "bytes_used": self.bytes_used,
        }


def usage(directory: Path, quota: int | None) -> Usage:
    """Measure a directory. `quota` is the operator's; without it, the limit that applies to the directory counts.

    Where nothing limits it, the quota is what it uses and what the file system still has for it: so the limit does not
    shrink while the store fills. `bytes_available` can still be written: what is left of the quota, or of the file
    system if that is less. Raises StoreError. Walks the directory, seconds for a million files: run it in a thread.
    """
    used = bytes_used(directory)
    with store_errors(f"asking for the space of {directory}"):
        descriptor = os.open(directory, _DIRECTORY)
        try:
            space = os.fstatvfs(descriptor)
            free = space.f_bavail * space.f_frsize
            if quota is None:
                quota = _dataset_quota(descriptor)
        finally:
            os.close(descriptor)
    if quota is None:
        quota = used + free
    return Usage(quota, max(0, min(quota - used, free)), used)


def bytes_used(directory: Path) -> int:
    """The bytes on disk of a directory and of everything below it; a file with several names counts once.

    Links are not followed, but `directory` may be one. What vanishes meanwhile is not counted. Raises StoreError. File
    systems that place blocks late (btrfs, ZFS, XFS) count young files in full only when they have been written out.
    """
    seen: set[tuple[int, int]] = set()
    with store_errors(f"measuring {directory}"):
        blocks = os.stat(directory).st_blocks
        pending = [os.path.realpath(directory)]
        while pending:
            path = pending.pop()
            try:
                descriptor = os.open(path, _DIRECTORY | os.O_NOFOLLOW)
            except (FileNotFoundError, NotADirectoryError):
                # Of a link, too, this says that it is no directory.
                continue
            try:
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        try:
                            status = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        if stat.S_ISDIR(status.st_mode):
                            pending.append(f"{path}/{entry.name}")
                        elif status.st_nlink > 1:
                            if (status.st_dev, status.st_ino) in seen:
                                continue
                            seen.add((status.st_dev, status.st_ino))
                        blocks += status.st_blocks
            finally:
                os.close(descriptor)
    return blocks * _BLOCK


def _dataset_quota(descriptor: int) -> int | None:
    """The limit in bytes that the file system sets to a directory; None where there is none or it is not told."""
    number = mount_id_of(descriptor)
    kind = next((mount.kind for mount in read_mounts() if mount.id == number), "")
    if kind == "zfs":
        space = os.fstatvfs(descriptor)
        return space.f_blocks * space.f_frsize
    return _qgroup_limit(descriptor) if kind == "btrfs" else _project_limit(descriptor)


def _project_limit(descriptor: int) -> int | None:
    attributes = bytearray(28)
    try:
        syscalls.ioctl(descriptor, _FS_GET_XATTR, attributes)
    except OSError:
        # The file system knows no projects.
        return None
    if not struct.unpack_from("=I", attributes)[0] & _PROJECT_INHERITED:
        return None
    limited = os.fstatvfs(descriptor)
    whole = _space_by_file(descriptor)
    if whole is not None and limited.f_blocks >= whole.f_blocks:
        return None
    return limited.f_blocks * limited.f_frsize


def _space_by_file(descriptor: int) -> os.statvfs_result | None:
    """What a plain file of the directory tells of the file system (a store has its `format`); None if it has none."""
    with os.scandir(descriptor) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    file = os.open(entry.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
                    try:
                        return os.fstatvfs(file)
                    finally:
                        os.close(file)
    return None


def _qgroup_limit(descriptor: int) -> int | None:
    """The smallest limit of the subvolume's qgroup and those above it; None where there is none or it is not told."""
    limits: list[int] = []
    with contextlib.suppress(OSError):
        groups = [_subvolume_of(descriptor)]
        # The list grows while it is gone through. It ends: a relation is kept in both directions, but only groups of a
        # higher level are above.
        for group in groups:
            limits += _limits_of(descriptor, group)
            for above, _ in _search_quotas(descriptor, group, _QGROUP_RELATION, 0, _ANY):
                if above >> _LEVEL_SHIFT > group >> _LEVEL_SHIFT and above not in groups:
                    groups.append(above)
    return min(limits, default=None)


def _limits_of(descriptor: int, group: int) -> Iterator[int]:
    for _, item in _search_quotas(descriptor, 0, _QGROUP_LIMIT, group, group):
        flags, referenced, exclusive = struct.unpack_from("=3Q", item)
        if flags & _MAX_REFERENCED:
            yield referenced
        if flags & _MAX_EXCLUSIVE:
            yield exclusive


def _subvolume_of(descriptor: int) -> int:
    argument = bytearray(_ARGUMENT)
    struct.pack_into("=QQ", argument, 0, 0, _FIRST_FREE_OBJECTID)
    syscalls.ioctl(descriptor, _INO_LOOKUP, argument)
    (subvolume,) = struct.unpack_from("=Q", argument)
    return int(subvolume)


def _search_quotas(descriptor: int, object_id: int, kind: int, first: int, last: int) -> list[tuple[int, bytes]]:
    """Offset and content of the quota tree's items with one object ID and type. Raises OSError.

    As many as fit into one answer: 124 without content.
    """
    argument = bytearray(_ARGUMENT)
    key = (_QUOTA_TREE, object_id, object_id, first, last, 0, _ANY, kind, kind, _ARGUMENT, 0)
    _SEARCH_KEY.pack_into(argument, 0, *key, 0, 0, 0, 0)
    syscalls.ioctl(descriptor, _TREE_SEARCH, argument)
    count = _SEARCH_KEY.unpack_from(argument)[9]
    items = []
    place = _SEARCH_KEY.size
    for _ in range(count):
        _, _, offset, _, length = _SEARCH_HEADER.unpack_from(argument, place)
        place += _SEARCH_HEADER.size
        items.append((offset, bytes(argument[place : place + length])))
        place += length
    return items
