"""The system calls that Python does not offer: openat2, statx, syncfs, prctl, ioprio_set, and ioctl without the lock.

Numbers and structures are from the kernel's uapi headers (asm-generic/unistd.h, linux/openat2.h, linux/prctl.h,
linux/ioprio.h, linux/stat.h); openat2 has the same number on every architecture that got it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import struct
from collections.abc import Iterator

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

_NR_OPENAT2 = 437
_NR_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}.get(platform.machine())
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_IOPRIO_CLASS_IDLE = 3 << 13
_IOPRIO_WHO_PROCESS = 1
_CLONE_NEWNET = 0x40000000

_AT_SYMLINK_NOFOLLOW = 0x100
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX_SIZE = 256
# struct statx: stx_mask, and at byte 80 stx_btime with its seconds and nanoseconds.
_STATX_BIRTH = struct.Struct("=I76xqI")

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
# A function object of its own, with the types told once: a hold opens every log with it.
_openat2 = _libc["syscall"]
_openat2.restype = ctypes.c_long
_openat2.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_linkat = _libc.linkat
_linkat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


@functools.cache
def _open_how(flags: int, resolve: int) -> bytes:
    """struct open_how: flags, mode, resolve."""
    return struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int) -> int:
    """Open `path` relative to `dir_fd` under the `resolve` restrictions; returns a descriptor, raises OSError.

    EAGAIN (a rename raced with the resolution) is tried again a few times, as openat2(2) advises.
    """
    if b"\0" in path:
        # C would end the path there and open another file.
        raise ValueError("embedded null byte")
    how = _open_how(flags, resolve)
    number = errno.EAGAIN
    for _ in range(8):
        descriptor: int = _openat2(_NR_OPENAT2, dir_fd, path, how, len(how))
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(number, os.strerror(number), os.fsdecode(path))


def link_open_file(descriptor: int, dir_fd: int, name: bytes) -> None:
    """Give the very file that is open another name; raises OSError, ENOENT where only CAP_DAC_READ_SEARCH may do it."""
    if _linkat(descriptor, b"", dir_fd, name, _AT_EMPTY_PATH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fallocate(descriptor: int, offset: int, length: int) -> None:
    """Have blocks allocated for a range of a file, which grows to hold it. Does nothing where that is not supported.

    posix_fallocate would write into every page there. Raises OSError (the disk is full).
    """
    if _fallocate(descriptor, 0, offset, length) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))


def birth_time_ns(descriptor: int, path: bytes = b"") -> int:
    """When the file `path` below the directory `descriptor` (itself, if empty) was born, in ns; 0 if nobody knows.

    A link in the last place is not followed. Raises OSError.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_SYMLINK_NOFOLLOW | (0 if path else _AT_EMPTY_PATH)
    if _libc.statx(ctypes.c_int(descriptor), ctypes.c_char_p(path), flags, _STATX_BTIME, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    mask, seconds, nanoseconds = _STATX_BIRTH.unpack_from(buffer)
    return seconds * 1_000_000_000 + nanoseconds if mask & _STATX_BTIME else 0


def syncfs(descriptor: int) -> None:
    """Write out the file system that holds `descriptor`; raises OSError (also for earlier write errors there)."""
    if _libc.syncfs(ctypes.c_int(descriptor)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def ioctl(descriptor: int, request: int, argument: bytearray) -> None:
    """ioctl(2) with a structure that the kernel reads and may write; raises OSError.

    fcntl.ioctl keeps the interpreter's lock while it runs with more than 1024 bytes, and a btrfs snapshot may take
    half a second: no other thread would see its deadline.
    """
    buffer = (ctypes.c_char * len(argument)).from_buffer(argument)
    if _libc.ioctl(ctypes.c_int(descriptor), ctypes.c_ulong(request), buffer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent(parent_pid: int, signal_number: int) -> None:
    """Ask the kernel to signal this process when its parent dies; exits at once if it is dead already."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent_pid:
        os._exit(0)


def become_subreaper() -> None:
    """Make orphaned descendants of this process its children, so that none can slip away from being reaped."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


@contextlib.contextmanager
def network_namespace(descriptor: int) -> Iterator[None]:
    """Put the calling thread, and no other, into the network namespace behind `descriptor` for the body.

    Raises OSError if that is refused. A socket made in the body stays in that namespace.
    """
    ours = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set_network_namespace(descriptor)
        try:
            yield
        finally:
            _set_network_namespace(ours)
    finally:
        os.close(ours)


def _set_network_namespace(descriptor: int) -> None:
    if _libc.setns(ctypes.c_int(descriptor), ctypes.c_int(_CLONE_NEWNET)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "setns")


def set_idle_io_priority() -> bool:
    """Give this process idle I/O priority; False where the architecture or the kernel does not know it."""
    if _NR_IOPRIO_SET is None:
        return False
    return bool(_syscall(_NR_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_CLASS_IDLE) == 0)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl {option}")
