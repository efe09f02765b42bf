"""Starts under way: one for each zone, and none is given up because its caller went away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from zonebundle.errors import ConflictError
from zonebundle.model.zone import Zone

log = structlog.get_logger()


class Starts:
    """The starts that a runtime has begun and not yet ended."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[Zone]] = {}

    def __contains__(self, zone: str) -> bool:
        return zone in self._tasks

    async def run(self, zone: str, start: Coroutine[Any, Any, Zone]) -> Zone:
        """Run `start` to its end, also if the caller is cancelled. Raises ConflictError beside another of the zone."""
        if zone in self._tasks:
            start.close()
            raise ConflictError(f"zone '{zone}' is being started")
        task = asyncio.create_task(start)
        self._tasks[zone] = task
        task.add_done_callback(lambda done: self._finish(zone, done))
        return await asyncio.shield(task)

    def _finish(self, zone: str, task: asyncio.Task[Zone]) -> None:
        del self._tasks[zone]
        # Whoever asked for it may not wait any more.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("%s", error)

    async def drain(self) -> None:
        """Return when none is under way."""
        while self._tasks:
            await asyncio.wait([*self._tasks.values()])
