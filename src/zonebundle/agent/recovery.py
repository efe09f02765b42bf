"""Start-up: what the last agent left in the spool, and on the file systems of the logs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import structlog

from zonebundle.agent.catalogue import BundleEntry, BundleState, Catalogue
from zonebundle.agent.state import StateDir
from zonebundle.capture.spool import Pending, Spool
from zonebundle.errors import FormatError, SnapshotError
from zonebundle.model.record import RECORD_FILE, Area, Intent, RecordHeader
from zonebundle.snapshots.areas import destroy_area, list_areas

_log = structlog.get_logger()

_CLEAR_PATIENCE = 10.0


class Recovery:
    """Sorts the spool: nothing begun → removed; intent without record → to be finished; record → to be sealed.

    After `run`, `recorded` are the bundles to be sealed, `unremoved` the intents of those whose zone may still have to
    be removed first: a record does not tell whether that was done.
    """

    def __init__(self, spool: Spool, state: StateDir, installation: str, threads: Executor) -> None:
        self._spool = spool
        self._state = state
        self._installation = installation
        self._threads = threads
        self.recorded: list[str] = []
        self.unremoved: list[Intent] = []

    async def run(self, catalogue: Catalogue) -> list[Intent]:
        """Clean up and list what is recorded; returns the intents that have to be finished."""
        pending = await asyncio.get_running_loop().run_in_executor(self._threads, lambda: list(self._spool.pending()))
        in_use = {area for entry in pending if entry.recorded for area in _areas_of(entry.path / RECORD_FILE)}
        interrupted: list[Intent] = []
        for entry in pending:
            ended = self._spool.end_commands(entry.bundle_id)
            if ended:
                _log.warning("ended commands that outlived the last agent", bundle=entry.bundle_id, processes=ended)
            if entry.recorded:
                self._list_recorded(entry, catalogue)
            elif entry.intent is None:
                # Before the intent was durable the zone was not touched: no trace is left.
                self._spool.remove(entry.bundle_id)
            else:
                await self._in_time(partial(self._clear, entry.intent, in_use), f"bundle {entry.bundle_id}")
                # Listed at once, though the zone has to be found first.
                catalogue.put(BundleEntry(entry.intent.metadata, BundleState.CAPTURING))
                interrupted.append(entry.intent)
        await self._in_time(partial(self._sweep, in_use), "bundles that have no entry")
        return interrupted

    def _list_recorded(self, entry: Pending, catalogue: Catalogue) -> None:
        try:
            with (entry.path / RECORD_FILE).open("rb") as file:
                header = RecordHeader.from_json(json.loads(file.readline()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, FormatError) as error:
            _log.error("capture record cannot be read; the entry is kept", path=str(entry.path), reason=str(error))
            if entry.intent is not None:
                catalogue.put(BundleEntry(entry.intent.metadata, BundleState.FAILED, reason=str(error)))
            return
        catalogue.put(
            BundleEntry(
                header.metadata,
                BundleState.SEALING,
                hold_seconds=header.hold_seconds,
                graceful_seconds=header.graceful_seconds,
            )
        )
        if entry.intent is not None and entry.intent.remove:
            self.unremoved.append(entry.intent)
        else:
            self.recorded.append(entry.bundle_id)

    async def _in_time(self, clear: Callable[[], None], of: str) -> None:
        clearing = asyncio.get_running_loop().run_in_executor(self._threads, clear)
        done, _ = await asyncio.wait({clearing}, timeout=_CLEAR_PATIENCE)
        if not done:
            # A file system that hangs must not keep the agent, and so every zone, from starting.
            _log.error("staging areas are not removed yet: their file system hangs", of=of)

    def _clear(self, intent: Intent, in_use: set[str]) -> None:
        """Destroy what the interrupted hold had taken; it is taken again. By name, mark and intent."""
        parents = [*self._state.staging, str(self._spool.entry(intent.metadata.bundle_id))]
        # Followers that were recorded before the leader still read its snapshot.
        free = [parent for parent in parents if str(Path(parent, intent.snapshot)) not in in_use]
        _destroy(_areas_in(free, intent), self._installation)

    def _sweep(self, in_use: set[str]) -> None:
        """Destroy what a hold has left of which there is no entry: neither intent nor record fitted on a full disk."""
        for staging in self._state.staging:
            try:
                areas = list(list_areas(Path(staging), self._installation))
            except OSError as error:
                _log.error("staging areas not looked through", path=staging, reason=str(error))
                continue
            orphans = [
                area for area in areas if area.path not in in_use and not self._spool.entry(area.leader).exists()
            ]
            for orphan in orphans:
                _log.warning("a staging area that nothing refers to is removed", path=orphan.path)
            _destroy(orphans, self._installation)


def _areas_in(parents: Iterable[str], intent: Intent) -> Iterator[Area]:
    """What a hold may have staged in these directories."""
    for parent in parents:
        yield Area("staged", str(Path(parent, intent.snapshot)), intent.metadata.bundle_id)


def _destroy(areas: Iterable[Area], installation: str) -> bool:
    """Destroy areas, also those that are not there; whether nothing is left. What is left is logged."""
    is_clean = True
    for area in areas:
        try:
            destroy_area(area, installation)
        except (OSError, SnapshotError) as error:
            _log.error("staging area not removed", path=area.path, reason=str(error))
            is_clean = False
    return is_clean


def discard(spool: Spool, staging: Iterable[str], intent: Intent, installation: str) -> None:
    """Remove an entry without a record, and what was staged for it. Blocks. What cannot be removed is logged."""
    if (spool.entry(intent.metadata.bundle_id) / RECORD_FILE).exists():
        # Only the answer that it is durable was lost: the next start seals it.
        return
    # An entry whose area is left stays: it is what the next start removes the area by.
    if not _destroy(_areas_in(staging, intent), installation):
        return
    try:
        spool.remove(intent.metadata.bundle_id)
    except OSError as error:
        _log.error("a failed hold is not cleaned up; the next start does it", reason=str(error))


def _areas_of(record: Path) -> set[str]:
    areas = set()
    with record.open("rb") as file:
        for line in file:
            if line.startswith(b'{"area":'):
                # A damaged record is reported where it is listed.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    areas.add(json.loads(line)["area"]["path"])
    return areas
