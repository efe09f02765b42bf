"""The processes of one life of a zone, found again and again while they fork, end and lose their parents."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef
from zonebundle.runtimes.waiting import ended, give_way

# How long a supervisor may stay when its last child has gone, before it is taken for one that hangs.
_LINGER = 1.0


class Tree(Protocol):
    """What is to be ended."""

    async def scan(self) -> list[ProcessRef]:
        """Every living process that is found now, parents first."""

    async def gone(self) -> None:
        """Return when nothing is left. Cancellable."""


async def below(roots: Iterable[ProcessRef]) -> list[ProcessRef]:
    """The roots that live and all their descendants, parents first.

    Between two reads of /proc a PID may have come to belong to somebody else: a child counts only if its parent is
    in the tree at the moment when its start time is read.
    """
    found: dict[int, ProcessRef] = {}
    pending: deque[tuple[int, int]] = deque()

    def add(pid: int, fields: list[str]) -> None:
        found[pid] = ProcessRef(pid, int(fields[proc.START_TIME]))
        pending.append((pid, int(fields[proc.THREADS])))

    for root in roots:
        await give_way()
        fields = proc.read_stat(root.pid)
        if proc.is_living(fields) and int(fields[proc.START_TIME]) == root.start_time:
            add(root.pid, fields)
    while pending:
        pid, threads = pending.popleft()
        # A thread's children are listed with the thread.
        for thread in [pid] if threads == 1 else proc.threads(pid):
            await give_way()
            for child in proc.children_of_thread(pid, thread):
                await give_way()
                if child not in found:
                    fields = proc.read_stat(child)
                    if proc.is_living(fields) and int(fields[proc.PARENT]) in found:
                        add(child, fields)
    return list(found.values())


async def in_session(session: int) -> list[ProcessRef]:
    """Every living process of a session."""
    found: list[ProcessRef] = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            await give_way()
            fields = proc.read_stat(int(name))
            if proc.is_living(fields) and int(fields[proc.SESSION]) == session:
                found.append(ProcessRef(int(name), int(fields[proc.START_TIME])))
    return found


class SupervisedTree:
    """All that lives below a supervisor: as a subreaper it adopts whatever loses its parent, so nothing slips away."""

    def __init__(self, supervisor: ProcessRef) -> None:
        self._supervisor = supervisor
        self._empty_since: float | None = None

    async def scan(self) -> list[ProcessRef]:
        """The zone's processes; the supervisor itself when it stays though nothing is below it any more."""
        found = await below([self._supervisor])
        if len(found) != 1:
            self._empty_since = None
            return found[1:]
        self._empty_since = self._empty_since or time.monotonic()
        return found if time.monotonic() - self._empty_since > _LINGER else []

    async def gone(self) -> None:
        """The supervisor goes when its last child has gone. What is left if it is killed, it cannot tell."""
        await ended(self._supervisor)


class ScatteredTree:
    """Processes without a supervisor: those known, their descendants, and what `search` finds besides.

    Who was seen once is remembered, also when its parent ends and it is adopted by somebody outside.
    """

    def __init__(self, roots: Iterable[ProcessRef], *search: Callable[[], Awaitable[list[ProcessRef]]]) -> None:
        self._known = list(roots)
        self._search = search

    async def scan(self) -> list[ProcessRef]:
        roots = dict.fromkeys(self._known)
        for search in self._search:
            roots |= dict.fromkeys(await search())
        found = await below(roots)
        # What another look has found during this one must not be forgotten.
        self._known = found + [process for process in self._known if process not in roots]
        return found

    async def gone(self) -> None:
        """Wait for each that is known, then look for more, until a look finds nothing."""
        while left := await self.scan():
            for process in left:
                await ended(process)


class Session:
    """Search for the processes of a session, as long as its number cannot have been given to another one."""

    def __init__(self, leader: ProcessRef) -> None:
        self._leader = leader
        self._held = True

    async def __call__(self) -> list[ProcessRef]:
        """The session's processes. A session that was found empty once is over: its number may come again."""
        if not self._held:
            return []
        found = await in_session(self._leader.pid)
        # The leader's PID is taken as long as the session has processes; whoever has it now began another session.
        stranger = proc.identify(self._leader.pid)
        if not found or (stranger is not None and stranger != self._leader):
            self._held = False
            return []
        return found
