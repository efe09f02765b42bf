"""Processes as /proc shows them. Every reader takes a moment's look: a process may be gone at the next line."""

from __future__ import annotations

import errno
import os
import signal
from collections import deque
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TypeGuard

from zonebundle.model.zone import Membership, ProcessRef

_READ = 16 << 10


@cache
def boot_id() -> str:
    """The kernel's ID of this boot: PIDs and start times mean nothing across it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _read(path: str) -> bytes | None:
    """What a file of /proc holds, None if its process is gone. Other errors (EMFILE) are raised: they prove nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(descriptor, _READ)
            while data and (more := os.read(descriptor, _READ)):
                data += more
        finally:
            os.close(descriptor)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return data


def read_stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command name, from `state` on; None if there is no such process.

    The name may hold anything, brackets and newlines too: fields are counted from the last `)`.
    """
    data = _read(f"/proc/{pid}/stat")
    return None if data is None else data[data.rfind(b")") + 2 :].decode("ascii", "replace").split()


# Positions in the list of read_stat (proc(5) counts from 1, and two fields are cut off).
STATE, PARENT, GROUP, SESSION, THREADS, START_TIME = 0, 1, 2, 3, 17, 19


def is_living(fields: list[str] | None) -> TypeGuard[list[str]]:
    """Whether these fields of read_stat are a living process's.

    A process whose first thread has ended is shown as a zombie while its other threads run on: it lives.
    """
    if fields is None or len(fields) <= START_TIME or fields[STATE] == "X":
        return False
    return fields[STATE] != "Z" or int(fields[THREADS]) > 1


def read_status(pid: int) -> dict[str, str] | None:
    """The lines of /proc/PID/status by their names; None if there is no such process.

    The process's own name comes first and has its newlines escaped: it cannot stand in for another line.
    """
    data = _read(f"/proc/{pid}/status")
    if data is None:
        return None
    lines = (line.partition(":") for line in data.decode("utf-8", "replace").split("\n"))
    return {name: value.strip() for name, _, value in lines}


def catches(process: ProcessRef, number: signal.Signals) -> bool:
    """Whether this very process lives and has a handler for the signal."""
    return _is_in(process, number, "SigCgt")


def has_default_action(process: ProcessRef, number: signal.Signals) -> bool:
    """Whether this very process lives and neither catches nor ignores the signal."""
    return is_alive(process) and not _is_in(process, number, "SigCgt", "SigIgn")


def _is_in(process: ProcessRef, number: signal.Signals, *sets: str) -> bool:
    data = _read(f"/proc/{process.pid}/status")
    if data is None or not is_alive(process):
        return False
    # Each process of a zone that is stopped is asked: all sixty lines would cost five times as much.
    return any(_mask(data, name) & 1 << (number - 1) for name in sets)


def _mask(status: bytes, name: str) -> int:
    begin = status.index(f"\n{name}:".encode()) + len(name) + 2
    return int(status[begin : status.index(b"\n", begin)], 16)


def identify(pid: int) -> ProcessRef | None:
    """The process that has this PID now, None if there is none or it is a zombie."""
    fields = read_stat(pid)
    return ProcessRef(pid, int(fields[START_TIME])) if is_living(fields) else None


def is_alive(process: ProcessRef) -> bool:
    """Whether this very process, not another with its PID, still runs (a zombie does not)."""
    return identify(process.pid) == process


def open_pidfd(process: ProcessRef) -> int | None:
    """A pidfd of this very process, None if it is gone. The start time is compared after the opening.

    Raises OSError where that cannot be told (no descriptor is left).
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError as error:
        # EINVAL, in newer kernels ENOENT: the number has been given to a thread since.
        if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
            return None
        raise
    try:
        if is_alive(process):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def send_signal(process: ProcessRef, *numbers: signal.Signals) -> bool:
    """Send these signals, in order, to this very process; False if it is gone. Raises PermissionError."""
    descriptor = open_pidfd(process)
    if descriptor is None:
        return False
    try:
        for number in numbers:
            signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def threads(pid: int) -> list[int]:
    """The threads of a process, none if it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def children_of_thread(pid: int, thread: int) -> list[int]:
    """The children that one thread of a process has forked or inherited.

    While a child ends, the kernel may leave out others: look again where that matters.
    """
    return [int(child) for child in (_read(f"/proc/{pid}/task/{thread}/children") or b"").split()]


def children(pid: int) -> list[int]:
    """The children of all threads of a process."""
    return [child for thread in threads(pid) for child in children_of_thread(pid, thread)]


def descendants(roots: Iterable[ProcessRef]) -> list[ProcessRef]:
    """The roots that live and all their descendants, parents first, zombies left out."""
    found: dict[int, ProcessRef] = {}
    pending = deque(root.pid for root in roots if is_alive(root))
    seen = set(pending)
    while pending:
        pid = pending.popleft()
        process = identify(pid)
        if process is not None:
            found[pid] = process
        fresh = [child for child in children(pid) if child not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return list(found.values())


def in_session(session: int) -> list[ProcessRef]:
    """Every process of a session, from a scan of /proc."""
    found: list[ProcessRef] = []
    for name in os.listdir("/proc"):
        if name.isdigit() and _may_be_in_session(int(name), session):
            fields = read_stat(int(name))
            if is_living(fields) and fields[SESSION] == str(session):
                found.append(ProcessRef(int(name), int(fields[START_TIME])))
    return found


def _may_be_in_session(pid: int, session: int) -> bool:
    # A hundredth of what reading its stat costs, on a host with thousands of processes.
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False
    except PermissionError:
        # A security module hides it; /proc may tell.
        return True


def in_cgroup(directory: str) -> list[ProcessRef]:
    """Every process of a cgroup and of those below it."""
    found: list[ProcessRef] = []
    for parent, _, _ in os.walk(directory):
        try:
            pids = Path(parent, "cgroup.procs").read_text().split()
        except OSError:
            continue
        found.extend(process for pid in pids if (process := identify(int(pid))))
    return found


def members(membership: Membership) -> list[ProcessRef]:
    """The zone's processes now, each once: roots and descendants, then the session, then the cgroup."""
    found = dict.fromkeys(descendants(membership.roots))
    if membership.session is not None:
        found |= dict.fromkeys(in_session(membership.session))
    if membership.cgroup is not None:
        found |= dict.fromkeys(in_cgroup(membership.cgroup))
    return list(found)
