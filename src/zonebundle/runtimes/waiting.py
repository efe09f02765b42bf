"""Wait in the event loop for processes to end."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from weakref import WeakKeyDictionary

from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef

_SLICE = 0.0005


async def ended(process: ProcessRef) -> None:
    """Return when this very process has ended, at once if it is gone already. Cancellable."""
    descriptor = proc.open_pidfd(process)
    if descriptor is None:
        return
    try:
        await readable(descriptor)
    finally:
        os.close(descriptor)


async def readable(descriptor: int) -> None:
    """Return when a descriptor can be read: a pidfd when its process has ended, a pipe when it has data or an end."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def fire() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, fire)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


class _Turns:
    """The share of one event loop's turns that long work may take: half a millisecond of each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._begin: float | None = None
        self._ends = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        if self._begin is None:
            self._begin = time.perf_counter()
            self._end_turn()
        elif time.perf_counter() - self._begin > _SLICE:
            turn: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(turn)
            await turn

    def _end_turn(self) -> None:
        if not self._ends:
            self._ends = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._ends = False
        self._begin = None
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                break
        if self._waiting:
            self._end_turn()


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = WeakKeyDictionary()


async def give_way() -> None:
    """Let the event loop go on, if long work has had its share of this turn; to be called before each short step of it.

    All long work of a loop shares one queue, so that a hundred stops at once hold up a request no longer than one.
    """
    loop = asyncio.get_running_loop()
    turns = _turns.get(loop)
    if turns is None:
        turns = _turns[loop] = _Turns(loop)
    await turns.take()
