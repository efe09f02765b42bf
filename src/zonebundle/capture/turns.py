"""Turns on the processors: of a hundred holds at once, a few work at a time, in the order of their coming.

All at once they would finish together, at the end, and spend more CPU on threads that fight for their interpreters'
locks. Taking turns is no waiting for another zone: a turn is over after `longest` seconds whatever its hold does then
(wait for a command, hang in a dead file system), and the next one begins. A hold's budget begins with its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

# A hold of some hundred files takes 10 to 40 ms of CPU.
LONGEST = 0.05


class Turns:
    """At most `at_once` turns are being taken, first come, first served. For one event loop."""

    def __init__(self, at_once: int, longest: float = LONGEST) -> None:
        self._free = at_once
        self._ahead: deque[asyncio.Future[None]] = deque()
        self._behind: deque[asyncio.Future[None]] = deque()
        self._longest = longest

    @contextlib.asynccontextmanager
    async def take(self, *, ahead: bool = False) -> AsyncIterator[None]:
        """Wait for a turn; it ends with the block, or `longest` seconds after its begin.

        `ahead` is for the end of a hold: it goes before those that have yet to begin.
        """
        await self._begin(ahead)
        is_over = False

        def end() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self._pass_on()

        timer = asyncio.get_running_loop().call_later(self._longest, end)
        try:
            yield
        finally:
            timer.cancel()
            end()

    async def _begin(self, ahead: bool) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._ahead if ahead else self._behind).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # It came in the same moment.
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while waiting := self._ahead or self._behind:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
