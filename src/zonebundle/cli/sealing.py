"""Waiting behind a release: a bundle is asked for its state until it is sealed or has failed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from zonebundle.cli.client import AsyncAgentClient, bundle_path

if TYPE_CHECKING:
    from rich.progress import Progress

Status = dict[str, Any]
FINAL_STATES = ("sealed", "failed")
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.5


async def follow_until_sealed(
    client: AsyncAgentClient, zone: str, bundle_id: str, on_status: Callable[[Status], None]
) -> Status:
    """The bundle's last status; `on_status` is told each one on the way. Cancelling it leaves the seal alone."""
    pause = _FIRST_PAUSE
    path = f"{bundle_path(zone, bundle_id)}/status"
    while True:
        status: Status = await client.call("GET", path)
        on_status(status)
        if status["state"] in FINAL_STATES:
            return status
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


class SealProgress:
    """One bar for all bundles being sealed: bytes sealed of all bytes known so far. Without a terminal: nothing."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task = progress.add_task("sealing", total=None) if progress else None
        self._states: dict[str, Status] = {}

    def update(self, bundle_id: str, status: Status) -> None:
        """Take in a bundle's new status."""
        self._states[bundle_id] = status
        if self._progress is None or self._task is None:
            return
        states = self._states.values()
        done = sum(status["state"] in FINAL_STATES for status in states)
        self._progress.update(
            self._task,
            description=f"sealing {done}/{len(states)}",
            total=sum(status.get("bytes_total") or 0 for status in states) or None,
            completed=sum(status.get("bytes_sealed") or 0 for status in states),
        )

    def print(self, line: str) -> None:
        """A line of the result, above the bar."""
        if self._progress is None:
            print(line, flush=True)
        else:
            # As text: a zone's name is never markup.
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def byte_progress(description: str, *, shown: bool, to_stderr: bool = False) -> Iterator[Progress | None]:
    """A progress display with bytes and speed, gone at the end; None unless `shown`."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=to_stderr), transient=True) as progress:
        yield progress
