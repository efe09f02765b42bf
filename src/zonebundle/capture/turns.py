"""Turns on the processors: of a hundred holds at once, a few work at a time, in the order of their coming.

All at once they would finish together, at the end, and spend more CPU on threads that fight for their interpreters'
locks. Taking turns is no waiting for another zone: a turn is over after `longest` seconds whatever its hold does then
(wait for a command, hang in a dead file system), and the next one begins. A hold's budget begins with its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

# A hold of some hundred files takes 10 to 40 ms of CPU.
LONGEST = 0.05


class Turns:
    """At most `at_once` turns are being taken, first come, first served. For one event loop."""

    def __init__(self, at_once: int, longest: float = LONGEST) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._longest = longest

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn; it ends with the block, or `longest` seconds after its begin."""
        await self._free.acquire()
        is_over = False

        def end() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self._free.release()

        timer = asyncio.get_running_loop().call_later(self._longest, end)
        try:
            yield
        finally:
            timer.cancel()
            end()
