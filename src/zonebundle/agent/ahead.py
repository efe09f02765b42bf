"""When rotated logs of zones that run are sealed ahead, and of which zones. The sealer does it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import structlog

from zonebundle.errors import ZoneBundleError
from zonebundle.model.zone import Zone

_log = structlog.get_logger()

# How long a runtime may take to list its zones (seconds), before it is done without.
_PATIENCE = 10.0


class Sealer(Protocol):
    """What this needs of the link to the sealer."""

    async def ask(self, do: str, **arguments: Any) -> Any: ...


class Lister(Protocol):
    """What this needs of a runtime."""

    @property
    def name(self) -> str: ...

    async def list(self) -> list[Zone]: ...


Name = Callable[[Sequence[Sequence[Zone]]], list[tuple[Zone, bool]]]
"""From the zones of each runtime, in their order, to all zones by the agent's names, with whether each is stopping."""


class Ahead:
    """Has rotated logs sealed every `period` seconds, one run at a time. Nothing of it is on the stop path.

    A runtime that hangs or is missing costs only its own zones: they are left out, and the sealer is told that the list
    is not complete, so that they keep what was sealed of them.
    """

    def __init__(
        self,
        period: float,
        runtimes: Sequence[Lister],
        name: Name,
        sealer: Sealer,
        largest: int,
        patience: float = _PATIENCE,
    ) -> None:
        """`period` 0 is off. Files of more than `largest` bytes are left to the seals."""
        self._period = period
        self._runtimes = runtimes
        self._name = name
        self._sealer = sealer
        self._largest = largest
        self._patience = patience
        self._task: asyncio.Task[None] | None = None
        # A listing that hangs is not begun a second time.
        self._listings: dict[int, asyncio.Task[list[Zone]]] = {}
        # What each runtime told the last time: its zones keep their names while it is away.
        self._last: dict[int, list[Zone]] = {}
        # Of a runtime, or of the sealer: told once.
        self._failures: dict[str, str] = {}

    def start(self) -> None:
        """Run from now on; the first time is one period from now."""
        if self._period:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Run no more. What the sealer has begun, it ends by itself."""
        tasks = [*self._listings.values(), *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period)
            try:
                await self.run_once()
                self._failures.pop("sealer", None)
            except ZoneBundleError as error:
                self._tell_failure("sealer", str(error))
            except Exception:
                # Of one run: the next may see the zones as they should be.
                _log.exception("sealing ahead failed unexpectedly")

    def _tell_failure(self, who: str, reason: str) -> None:
        if self._failures.get(who) != reason:
            _log.warning("rotated logs are not all sealed ahead", because_of=who, reason=reason)
        self._failures[who] = reason

    async def run_once(self) -> dict[str, Any]:
        """List the zones, and have the sealer do what there is to do; returns its answer. Raises StoreError."""
        complete = await self._list()
        lists = [self._last.get(number, []) for number in range(len(self._runtimes))]
        zones = [
            {
                "name": zone.name,
                "is_running": zone.state == "running" and not is_stopping,
                "trees": [tree.to_json() for tree in zone.logs],
            }
            for zone, is_stopping in self._name(lists)
        ]
        told: dict[str, Any] = await self._sealer.ask("ahead", zones=zones, complete=complete, largest=self._largest)
        return told

    async def _list(self) -> bool:
        """Ask every runtime for its zones; whether all have answered."""
        for number, runtime in enumerate(self._runtimes):
            if number not in self._listings:
                self._listings[number] = asyncio.get_running_loop().create_task(runtime.list())
        await asyncio.wait(self._listings.values(), timeout=self._patience)
        complete = True
        for number, runtime in enumerate(self._runtimes):
            if not self._listings[number].done():
                self._tell_failure(runtime.name, f"it has not listed its zones within {self._patience:g} s")
            else:
                try:
                    self._last[number] = self._listings.pop(number).result()
                    self._failures.pop(runtime.name, None)
                    continue
                except Exception as error:
                    # Whatever it is, it is of this runtime.
                    self._tell_failure(runtime.name, str(error))
            complete = False
            self._last[number] = [replace(zone, state="stopped") for zone in self._last.get(number, [])]
        return complete
