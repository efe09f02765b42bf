"""The probes `who` and `last`: logins as utmp(5) and wtmp(5) tell them, read from outside.

A zone that shares the host's mounts is told the host's logins, any other its own. The files are the zone's: they are
opened below its root without following a link, on local file systems only (a read of a FUSE mount is answered, or not,
by whoever serves it), and taken apart by the fixed size of their records, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import platform
import struct
from collections.abc import Iterator, Sequence

from zonebundle.capture.probe_result import Skipped
from zonebundle.capture.process_view import Gone, Opened, ProcessView, host_namespaces, opened, read_at
from zonebundle.errors import HostError
from zonebundle.host import files, mounts, syscalls
from zonebundle.model.metadata import format_time
from zonebundle.model.paths import printable

# struct utmp of glibc: type, pid, line, id, user, host, exit (2), session, seconds, microseconds, address. Its times
# are 32 bits wide on most 64-bit machines (__WORDSIZE_TIME64_COMPAT32), and 64 on aarch64.
_RECORD = struct.Struct("=hxxi32s4s32s256s4xiii36x" if platform.machine() != "aarch64" else "=hxxi32s4s32s256s4xqqq40x")
_BOOT, _USER, _DEAD = 2, 7, 8
# A login costs 3 µs to show; the newest are the ones that matter.
_MAX_RECORDS = 256
_MAX_SHOWN = 100
_TABLE_LIMIT = 4 << 20

_LOCAL = frozenset(b"btrfs erofs ext2 ext3 ext4 f2fs overlay ramfs rootfs squashfs tmpfs xfs zfs".split())
# /var/run is a link to /run nearly everywhere, and is passed over there.
_UTMP = (("run", "utmp"), ("var/run", "utmp"))
_WTMP = (("var/log", "wtmp"),)
_TO_DIRECTORY = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS

_Record = tuple[int, int, bytes, bytes, bytes, bytes, int, int, int]


def who(views: Sequence[ProcessView]) -> Iterator[str]:
    """Who is logged in: user, terminal, time, from where."""
    where, records = _read(views, _UTMP)
    yield f"logins of {where}"
    for kind, _, line, _, user, host, _, seconds, _ in records[:_MAX_SHOWN]:
        if kind == _USER:
            yield f"{_text(user):<8} {_text(line):<12} {_time(seconds)}" + (f" ({_text(host)})" if host[0] else "")


def last(views: Sequence[ProcessView]) -> Iterator[str]:
    """The latest logins and boots, newest first, with their ends where these are told."""
    where, records = _read(views, _WTMP)
    yield f"last logins of {where}"
    ends: dict[bytes, str] = {}
    shown = 0
    for kind, _, line, _, user, host, _, seconds, _ in reversed(records):
        if kind == _DEAD:
            ends[line] = _time(seconds)
        elif kind == _BOOT:
            yield f"{'reboot':<8} {'system boot':<12} {_text(host):<16} {_time(seconds)}"
            ends.clear()
        elif kind == _USER:
            end = ends.pop(line, "")
            yield f"{_text(user):<8} {_text(line):<12} {_text(host):<16} {_time(seconds)} - {end or 'not told'}"
        else:
            continue
        shown += 1
        if shown == _MAX_SHOWN:
            yield f"(the newest {_MAX_SHOWN})"
            return


def _text(field: bytes) -> str:
    return printable(field.partition(b"\0")[0])


def _time(seconds: int) -> str:
    try:
        return f"{format_time(seconds)[:19]}Z"
    except (ValueError, OverflowError, OSError):
        # Where it is 64 bits wide, whoever wrote the file may have put it beyond the calendar.
        return str(seconds)


def _read(views: Sequence[ProcessView], places: tuple[tuple[str, str], ...]) -> tuple[str, list[_Record]]:
    """Whose logins they are, and the newest records in the file's order. Raises Skipped."""
    for view in views:
        with contextlib.suppress(Gone), opened(view.process, check_after=False) as found:
            is_hosts, root = _open_root(found)
            where = "the host (the zone shares its mounts)" if is_hosts else "the zone"
            try:
                for directory, name in places:
                    data = _tail(root, directory, name, None if is_hosts else found)
                    if data is not None:
                        return where, list(_RECORD.iter_unpack(data))
            finally:
                os.close(root)
            raise Skipped(f"{where} keeps no {places[0][1]}")
    raise Skipped("no process of the zone runs")


def _open_root(found: Opened) -> tuple[bool, int]:
    """Whether it is the host's own root that the zone sees, and a descriptor of what it sees. Raises Skipped."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        shares = os.readlink("ns/mnt", dir_fd=found.content) in host_namespaces("mnt")
        if shares and os.readlink("root", dir_fd=found.content) == "/":
            return True, os.open("/", flags)
        return False, os.open("root", flags, dir_fd=found.content)
    except PermissionError as error:
        raise Skipped(f"the zone's root may not be seen: {error.strerror}") from None


def _tail(root: int, directory: str, name: str, zone: Opened | None) -> bytes | None:
    """Whole records from the end of a login file; None if it is not there, or is no plain file.

    Where the root is that of a `zone`, also None if the file system is not a local one.
    """
    try:
        # A mount in the way (/run mostly is one) is entered, but only to look what it is.
        handle = syscalls.openat2(root, directory.encode(), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, _TO_DIRECTORY)
    except OSError:
        return None
    try:
        if zone is not None and not _is_local(zone, handle):
            return None
        return _last_records(handle, name)
    except (OSError, HostError):
        return None
    finally:
        os.close(handle)


def _last_records(directory: int, name: str) -> bytes:
    descriptor, status = files.open_regular_beneath(directory, name)
    try:
        size = min(status.st_size // _RECORD.size, _MAX_RECORDS) * _RECORD.size
        end = status.st_size - status.st_size % _RECORD.size
        data = os.pread(descriptor, size, end - size)
    finally:
        os.close(descriptor)
    return data[: len(data) - len(data) % _RECORD.size]


def _is_local(zone: Opened, directory: int) -> bool:
    """Whether the mount of `directory` is of a kind that the kernel itself serves.

    statfs would tell as well, but asks the server of a FUSE mount, which is what must not be waited for.
    """
    number = b"\n%d " % mounts.mount_id_of(directory)
    # Its own table leaves out what is not below its root: the very mount of the root, after a chroot.
    for name in ("mountinfo", "/proc/self/mountinfo"):
        table = b"\n" + read_at(zone.content, name, _TABLE_LIMIT)
        start = table.find(number)
        if start >= 0:
            line = table[start + 1 : table.find(b"\n", start + 1)]
            return line.partition(b" - ")[2].partition(b" ")[0] in _LOCAL
    return False
