"""What every runtime offers the agent, and the patience of a graceful stop."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable
from typing import Protocol

from zonebundle.model.zone import Zone


class Grace:
    """How long a graceful stop may take, in seconds; a stop that joins may shorten it, never lengthen it.

    The clock starts with the first `wait`; it goes on over further ones. Used within one event loop.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = max(0.0, seconds)
        self._deadline: float | None = None
        self._shortened = asyncio.Event()

    def shorten(self, seconds: float) -> None:
        """Let the grace end `seconds` from now at the latest (from the start of the waiting, if that is to come)."""
        seconds = max(0.0, seconds)
        if self._deadline is None:
            self._seconds = min(self._seconds, seconds)
        else:
            self._deadline = min(self._deadline, asyncio.get_running_loop().time() + seconds)
            self._shortened.set()

    async def wait(self, done: Awaitable[object]) -> bool:
        """Wait for `done` while the grace lasts; whether `done` finished in time.

        A coroutine is cancelled when the grace ends or the wait is cancelled; a future or task is left alone.
        What `done` raises is raised.
        """
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._seconds
        waited = asyncio.ensure_future(done)
        try:
            while not waited.done() and (left := self._deadline - loop.time()) > 0:
                self._shortened.clear()
                shortened = asyncio.ensure_future(self._shortened.wait())
                try:
                    await asyncio.wait({waited, shortened}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    shortened.cancel()
            if not waited.done() and waited is not done:
                # A new task has not run yet where there is no grace at all: what is done already counts.
                await asyncio.sleep(0)
        finally:
            if waited is not done and not waited.done():
                waited.cancel()
                await asyncio.wait({waited})
        if not waited.done() or waited.cancelled():
            return False
        waited.result()
        return True


class Runtime(Protocol):
    """Runs zones. All methods run in the agent's event loop and never block it for more than about a millisecond.

    A runtime that lacks its tool raises RuntimeUnavailableError.
    """

    @property
    def name(self) -> str:
        """The runtime's name in the configuration, which is also in `Zone.runtime`."""

    async def list(self) -> builtins.list[Zone]:
        """Every zone that the runtime knows, running or stopped."""

    async def find(self, zone: str) -> Zone | None:
        """A fresh look at one zone, None if the runtime does not know it. A stopped zone has no `init`."""

    async def start(self, zone: str) -> Zone:
        """Start a stopped zone; returns when its command has been executed.

        Raises NoSuchZoneError, ConflictError if it runs or is being started, RuntimeFailedError if it cannot be
        started. A caller that is cancelled does not cancel the start.
        """

    async def stop(self, zone: Zone, grace: Grace) -> None:
        """End that incarnation of the zone, and no other; returns when none of its processes is left.

        An incarnation that is gone already is fine, and one that replaced it is left alone. Raises
        RuntimeFailedError if something cannot be ended. Cancelled, it leaves the zone as far as it has come.
        """

    async def remove(self, zone: Zone) -> None:
        """Remove a stopped zone from the runtime. Raises ConflictError if it runs; a missing one is fine."""

    async def close(self) -> None:
        """Let go of everything but the zones, which go on."""
