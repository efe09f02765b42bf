"""Descriptors, processes, threads and mounts, counted before and after."""

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support import filesystems

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_libc = ctypes.CDLL(None, use_errno=True)

# Other workers of the same test run mount and unmount meanwhile: only what is below this one's directory is its own.
# conftest sets it.
mounts_below = Path("/")


@dataclass(frozen=True)
class Resources:
    """What this process holds, each as a line that names it."""

    descriptors: frozenset[str]
    processes: frozenset[str]
    threads: frozenset[str]
    mounts: frozenset[str]

    def beyond(self, before: "Resources") -> list[str]:
        """Lines for what is held here and was not held `before`."""
        kinds = {
            "descriptor": self.descriptors - before.descriptors,
            "process": self.processes - before.processes,
            "thread": self.threads - before.threads,
            "mount": self.mounts - before.mounts,
        }
        return [f"{kind} {line}" for kind, lines in kinds.items() for line in sorted(lines)]


def held() -> Resources:
    """What this process holds now. Children count with their children; threads are Python's."""
    return Resources(
        descriptors=frozenset(_descriptors()),
        processes=frozenset(_descendants()),
        threads=frozenset(f"{thread.name} ({thread.native_id})" for thread in threading.enumerate()),
        mounts=frozenset(_mounts()),
    )


@contextlib.contextmanager
def no_leaks(*, timeout: float = 5.0, orphans: bool = False) -> Iterator[None]:
    """Fail with AssertionError, naming each, if the body leaves a descriptor, process, thread or mount behind.

    What is going away gets `timeout` seconds for it. With `orphans`, processes whose parent died are found too: this
    process adopts them meanwhile. Dead children are then reaped here, so only the default finds an unreaped child.
    """
    before = held()
    with _subreaper() if orphans else contextlib.nullcontext():
        yield
        deadline = time.monotonic() + timeout
        pause = 0.002
        while leaked := held().beyond(before):
            if pause > 0.01:
                # A cycle that keeps a file open is garbage, no leak. This is slow, and most are only not gone yet.
                gc.collect()
            if orphans:
                _reap_dead_children(before)
            if time.monotonic() > deadline:
                raise AssertionError("leaked: " + "; ".join(leaked))
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)


def _descriptors() -> Iterator[str]:
    listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(listing):
            if int(name) == listing:
                continue
            with contextlib.suppress(FileNotFoundError):
                yield f"{name} → {os.readlink(name, dir_fd=listing)}"
    finally:
        os.close(listing)


def _stat(pid: int) -> tuple[int, str, str, str] | None:
    """Parent, state, start time and name of a process; None once it is gone."""
    # Many tests look at every process twice: not by way of Path, which takes as long again.
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        text = os.read(descriptor, 4096).decode(errors="replace")
    except ProcessLookupError:
        return None
    finally:
        os.close(descriptor)
    # The name may hold spaces and parentheses: what follows the last one is fixed.
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    return int(fields[1]), fields[0], fields[19], head.partition("(")[2]


def _descendants() -> Iterator[str]:
    children: dict[int, list[tuple[int, str]]] = {}
    for pid in _pids():
        if stat := _stat(pid):
            parent, state, started, name = stat
            dead = ", dead but not reaped" if state == "Z" else ""
            children.setdefault(parent, []).append((pid, f"{pid} ({name}, started {started}{dead})"))
    waiting = [os.getpid()]
    while waiting:
        for pid, line in children.get(waiting.pop(), ()):
            yield line
            waiting.append(pid)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _mounts() -> Iterator[str]:
    for point in filesystems.mount_points():
        # The fixtures' own mounts come and go with their scope.
        if point.is_relative_to(mounts_below) and not filesystems.is_fixture_mount(point):
            yield str(point)


def _reap_dead_children(before: Resources) -> None:
    known = {int(line.split()[0]) for line in before.processes}
    for pid in _pids():
        stat = _stat(pid)
        if stat and stat[0] == os.getpid() and stat[1] == "Z" and pid not in known:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    was = ctypes.c_int()
    _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was), 0, 0, 0)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, was.value, 0, 0, 0)
