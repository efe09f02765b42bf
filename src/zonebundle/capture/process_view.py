"""One look at a process, shared by the probes that tell of it.

A view reads each file of /proc at most once. The directory /proc/PID is opened, then the start time is compared: from
there on everything is read relative to that descriptor, which belongs to this very process for ever. When it ends, or
its PID goes to another, reads through it fail (ESRCH, ENOENT) instead of telling of the stranger.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from zonebundle.model.paths import printable
from zonebundle.model.zone import ProcessRef

T = TypeVar("T")

# A process may have a million descriptors and an argument list of megabytes; a hold has milliseconds.
MAX_DESCRIPTORS = 1000
COMMAND_LIMIT = 128 << 10
_SMALL = 4096
_LONGEST_TITLE = 400

_ACCESS = ("O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE")
_FLAGS = tuple(
    (getattr(os, name), name)
    for name in ("O_APPEND", "O_NONBLOCK", "O_SYNC", "O_DSYNC", "O_DIRECT", "O_DIRECTORY", "O_PATH", "O_TMPFILE")
)


class Gone(Exception):
    """The process has ended, or its PID is another's by now."""

    def __init__(self) -> None:
        super().__init__("the process is gone")


class Once(Generic[T]):
    """A value made by the first thread that asks for it; a failure is kept as well."""

    __slots__ = ("_error", "_lock", "_make", "_value")

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._value: T | None = None
        self._error: Exception | None = None

    def __call__(self) -> T:
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._value is None:
                try:
                    self._value = self._make()
                except Exception as error:
                    self._error = error
                    raise
            return self._value


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/PID/stat tells (proc(5)). Times are clock ticks, `start_time` after boot; `resident` is pages."""

    name: bytes
    state: str
    parent: int
    user: int
    system: int
    threads: int
    start_time: int
    resident: int

    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs. A leader that ended before its other threads shows as a zombie, and is none."""
        return self.state in "ZX" and self.threads < 2


@dataclass(frozen=True, slots=True)
class Opened:
    """A process held by a descriptor of its directory. `content` is where its files are read."""

    directory: int
    content: int
    stat: Stat


@dataclass(frozen=True, slots=True)
class Basics:
    """What can be read of a process whatever it does. `net_namespace` is empty where we may not see it."""

    stat: Stat
    cgroup: bytes
    net_namespace: str


@dataclass(frozen=True, slots=True)
class Files:
    """The descriptors of a process: number, target, and for files flags (octal digits) and offset.

    `sockets` are inodes, `limit` is how many descriptors it may have. `is_complete` is false where there are more than
    are looked at; `denied` says why there are none at all.
    """

    entries: tuple[tuple[int, str, bytes, bytes], ...] = ()
    sockets: frozenset[int] = frozenset()
    limit: str = "unknown"
    is_complete: bool = True
    denied: str = ""


def read_at(directory: int, name: str, limit: int = _SMALL) -> bytes:
    """At most `limit` bytes of a file of /proc. Tables come in pieces of whole lines, each under a page: only an empty
    one is the end.
    """
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    try:
        data = os.read(descriptor, limit)
        pieces = [data]
        left = limit - len(data)
        while data and left:
            data = os.read(descriptor, left)
            pieces.append(data)
            left -= len(data)
    finally:
        os.close(descriptor)
    return b"".join(pieces)


def read_small(directory: int, name: str) -> bytes:
    """A file of /proc that is one record (stat, status, stack, fdinfo …) and so comes in one piece, under a page."""
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    try:
        return os.read(descriptor, _SMALL)
    finally:
        os.close(descriptor)


def parse_stat(data: bytes) -> Stat:
    """Parse a line of /proc/PID/stat; the name may hold brackets and newlines, so it ends at the last `)`."""
    end = data.rindex(b")")
    fields = data[end + 2 :].split()
    return Stat(
        name=data[data.index(b"(") + 1 : end],
        state=fields[0].decode("ascii", "replace"),
        parent=int(fields[1]),
        user=int(fields[11]),
        system=int(fields[12]),
        threads=int(fields[17]),
        start_time=int(fields[19]),
        resident=int(fields[21]),
    )


@contextlib.contextmanager
def opened(process: ProcessRef, *, check_after: bool = True) -> Iterator[Opened]:
    """Hold this very process open; raises Gone if it is not there, or not there any more when the body has read.

    Without `check_after` the body takes what it gets: of this process in any case, but maybe while it ends.
    """
    try:
        directory = os.open(f"/proc/{process.pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Gone from None
    thread = -1
    try:
        stat = _verified(directory, process)
        content = directory
        if stat.state == "Z":
            content = thread = _open_living_thread(directory)
        try:
            yield Opened(directory, content, stat)
        except (FileNotFoundError, ProcessLookupError):
            # Either this kernel has no such file, or the process went away.
            _check_lives(content)
            raise
        if check_after:
            _check_lives(content)
    finally:
        os.close(directory)
        if thread >= 0:
            os.close(thread)


def _verified(directory: int, process: ProcessRef) -> Stat:
    try:
        stat = parse_stat(read_small(directory, "stat"))
    except (FileNotFoundError, ProcessLookupError):
        raise Gone from None
    if stat.start_time != process.start_time or stat.is_over:
        raise Gone
    return stat


def _check_lives(content: int) -> None:
    """Raise Gone if the process has ended or is ending: what was read last is then empty or half.

    It can be nobody else's directory, so this asks only for life: an exiting process loses its program first, before
    descriptors and namespaces, and long before it becomes a zombie. It costs a third of reading its stat.
    """
    try:
        os.readlink("exe", dir_fd=content)
    except PermissionError:
        pass
    except OSError:
        raise Gone from None


def _open_living_thread(directory: int) -> int:
    """The directory of a thread that lives: the leader's own shows neither arguments nor descriptors once it ended."""
    tasks = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        for name in os.listdir(tasks):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if parse_stat(read_small(tasks, f"{name}/stat")).state not in "ZX":
                    return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tasks)
    finally:
        os.close(tasks)
    raise Gone


class ProcessView:
    """What several probes of one zone need of one process. Every part is read when first asked for, by any thread."""

    __slots__ = ("basics", "files", "process")

    def __init__(self, process: ProcessRef) -> None:
        self.process = process
        self.basics = Once(self._read_basics)
        self.files = Once(self._read_files)

    def _read_basics(self) -> Basics:
        with opened(self.process, check_after=False) as found:
            try:
                net_namespace = os.readlink("ns/net", dir_fd=found.content)
            except PermissionError:
                net_namespace = ""
            return Basics(found.stat, read_at(found.content, "cgroup", 16 << 10), net_namespace)

    def _read_files(self) -> Files:
        with opened(self.process) as found:
            try:
                return _list_files(found.content)
            except PermissionError as error:
                return Files(denied=error.strerror or "not permitted")


def title(name: bytes, command: bytes) -> str:
    """A command line (arguments ended by NUL) for people, bounded; the process's name in brackets if it is empty."""
    if not command:
        return f"[{printable(name)}]"
    text = printable(command[:_LONGEST_TITLE].rstrip(b"\0").replace(b"\0", b" "))
    return f"{text} …" if len(command) > _LONGEST_TITLE else text


def _list_files(content: int) -> Files:
    links = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=content)
    try:
        infos = os.open("fdinfo", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=content)
        try:
            # Not listdir: a million entries are listed only as far as they are looked at.
            with os.scandir(links) as listing:
                names = [entry.name for entry in itertools.islice(listing, MAX_DESCRIPTORS + 1)]
            entries = []
            sockets = []
            for name in names[:MAX_DESCRIPTORS]:
                try:
                    target = os.readlink(name, dir_fd=links)
                    # Reading the flags costs twice the link; of pipes and sockets they tell little.
                    flags, offset = _parse_info(read_small(infos, name)) if target[0] == "/" else _NO_INFO
                except (FileNotFoundError, ProcessLookupError):
                    continue
                entries.append((int(name), target, flags, offset))
                if target.startswith("socket:["):
                    sockets.append(int(target[8:-1]))
        finally:
            os.close(infos)
    finally:
        os.close(links)
    limits = read_small(content, "limits")
    start = limits.find(b"\nMax open files")
    limit = limits[start + 15 : start + 40].split()[0].decode("ascii", "replace") if start >= 0 else "unknown"
    return Files(tuple(entries), frozenset(sockets), limit, len(names) <= MAX_DESCRIPTORS)


_NO_INFO = (b"", b"0")


def _parse_info(data: bytes) -> tuple[bytes, bytes]:
    # The kernel writes these two first: "pos:\t0\nflags:\t0100002\n…"
    offset, _, rest = data.partition(b"\nflags:\t")
    return rest.partition(b"\n")[0], offset[5:]


@lru_cache(maxsize=256)
def flag_names(octal: bytes) -> str:
    """The open flags of a descriptor by name: `O_RDWR|O_APPEND` of b"02002"."""
    value = int(octal, 8)
    names = [name for bits, name in _FLAGS if bits and value & bits == bits]
    return "|".join([_ACCESS[value & os.O_ACCMODE], *names])


def host_namespaces(kind: str) -> frozenset[str]:
    """The namespaces of `kind` ("net", "mnt") that are the host's: PID 1's, where it may be seen, and our own."""
    found = {os.readlink(f"/proc/self/ns/{kind}")}
    with contextlib.suppress(OSError):
        found.add(os.readlink(f"/proc/1/ns/{kind}"))
    return frozenset(found)
