"""The hold of a zone, as the agent conducts it. `Capturer.capture` is the picture of the stop path."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from zonebundle.capture.order import FinishOrder, HoldOrder, HoldSettings, SharedSnapshot
from zonebundle.capture.probe_stacks import stack_tool
from zonebundle.capture.spool import Spool
from zonebundle.capture.turns import Turns
from zonebundle.capture.workers import HoldWorker, HoldWorkers, WorkerDiedError
from zonebundle.errors import HostError, ZoneBundleError
from zonebundle.host import trace
from zonebundle.model.record import Intent
from zonebundle.model.report import Gap
from zonebundle.snapshots.group import SnapshotGroup

_log = structlog.get_logger()

# Beyond the budget, which the worker keeps by itself: one that is so much later hangs where it should not, or the host
# is so busy that killing it would only lose evidence.
_MARGIN = 10.0
# The record is written to a disk that may be busy; there is nothing better to do than to wait for it.
_RECORD_PATIENCE = 60.0

Halt = Callable[[], Awaitable[None]]


class StagingRegistry(Protocol):
    """Remembers, durably, which staging directories were ever used: recovery looks into them."""

    async def remember(self, directories: list[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Captured:
    """What became of a hold. Seconds; `hold_seconds` is all but the graceful stop.

    `recorded`: the evidence is safe and can be sealed. `failure`: what the runtime said when it could not stop the
    zone. `gaps` counts what the bundle lacks so far. `followers` are the bundles that share a snapshot of this one.
    """

    bundle_id: str
    recorded: bool
    hold_seconds: float
    graceful_seconds: float
    gaps: int
    failure: ZoneBundleError | None = None
    reasons: tuple[Gap, ...] = ()
    followers: tuple[str, ...] = ()


@dataclass(slots=True)
class _Conduct:
    """One hold on its way: the worker may be replaced, the gaps grow."""

    order: HoldOrder
    stack: contextlib.AsyncExitStack
    worker: HoldWorker
    gaps: list[Gap] = field(default_factory=list)
    begun: dict[str, Any] = field(default_factory=dict)
    followers: tuple[str, ...] = ()


class Capturer:
    """Conducts holds. Shares with other holds nothing but a processor, and the snapshot of a common file system."""

    def __init__(self, workers: HoldWorkers, spool: Spool, staging: StagingRegistry) -> None:
        self._workers = workers
        self._spool = spool
        self._staging = staging
        self._groups = SnapshotGroup()
        self._turns = Turns(2 * (os.cpu_count() or 1))

    async def capture(
        self,
        intent: Intent,
        settings: HoldSettings,
        *,
        probe: bool,
        living: bool,
        halt: Halt | None = None,
        gaps: tuple[Gap, ...] = (),
        remove: Callable[[], bool] = bool,
    ) -> Captured:
        """Hold the zone, keep its evidence, return when it is safe and the zone may go.

        `probe`: its processes are there to be looked at. `living`: it runs on while its logs are taken. `halt` stops
        it between the look and the snapshot. `remove` is asked, as late as can be, whether the zone is removed
        afterwards: what is staged is then made durable. What goes wrong becomes a gap. Run it in a task of its own: a
        vanished client must not cancel it. Raises UnavailableError if no worker can be had; the zone is untouched then.
        """
        began = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            worker = await stack.enter_async_context(self._workers.take(exclusive=_runs_commands(settings)))
            order = HoldOrder(str(self._spool.entry(intent.metadata.bundle_id)), intent, began, settings, probe)
            conduct = _Conduct(order, stack, worker, list(gaps))
            durable = asyncio.ensure_future(self._write_intent(intent, conduct))
            try:
                await self._look(conduct)
            finally:
                # Never left behind: whether the intent is durable decides what the next start does.
                recoverable = await durable
            trace.point("stop.probed")
            graceful, failure = await self._halt(halt)
            trace.point("stop.terminated")
            recorded, missing = False, len(conduct.gaps)
            if recoverable or self._spool.entry(intent.metadata.bundle_id).is_dir():
                snapshots = await self._take_snapshots(conduct)
                recorded, missing = await self._record(conduct, graceful, snapshots, living=living, remove=remove)
            else:
                conduct.gaps.append(Gap("bundle", f"no evidence could be kept: {self._spool.path} cannot be written"))
                missing = len(conduct.gaps)
        return Captured(
            bundle_id=intent.metadata.bundle_id,
            recorded=recorded,
            hold_seconds=time.monotonic() - began - graceful,
            graceful_seconds=graceful,
            gaps=missing,
            failure=failure,
            reasons=tuple(conduct.gaps),
            followers=conduct.followers,
        )

    async def _write_intent(self, intent: Intent, conduct: _Conduct) -> bool:
        try:
            await self._spool.write_intent(intent)
        except OSError as error:
            # The zone's stop goes before our wish to survive a crash in the middle of it.
            conduct.gaps.append(Gap("not-recoverable", f"the intent could not be written: {error}"))
            _log.error("intent not written; the stop goes on", zone=intent.zone.name, reason=str(error))
            return False
        finally:
            # Also without the intent: the stop goes on, so commands have nothing more to wait for.
            conduct.worker.notify({"do": "go"})
        return True

    async def _look(self, conduct: _Conduct) -> None:
        budget = conduct.order.settings.budget
        try:
            async with self._turns.take():
                await self._begin(conduct, conduct.order, budget + _MARGIN)
        except WorkerDiedError as error:
            await self._replace_worker(conduct, f"probes and commands were lost: {error}")
        except HostError as error:
            conduct.gaps.append(Gap("probes", str(error)))

    async def _begin(self, conduct: _Conduct, order: HoldOrder, patience: float) -> None:
        message = {"do": "begin", "order": order.to_json()}
        conduct.begun = await conduct.worker.call(message, patience, order.settings)

    async def _replace_worker(self, conduct: _Conduct, reason: str) -> None:
        """Go on with a fresh worker, without probes: the zone waits."""
        order = conduct.order
        _log.warning("hold worker replaced", zone=order.intent.zone.name, reason=reason)
        conduct.gaps.append(Gap("probes", reason))
        self._spool.end_commands(order.intent.metadata.bundle_id)
        conduct.worker = await conduct.stack.enter_async_context(self._workers.take(exclusive=True))
        again = HoldOrder(order.entry, order.intent, order.began, order.settings, probe=False)
        try:
            await self._begin(conduct, again, _MARGIN)
        except HostError as error:
            conduct.gaps.append(Gap("logs", f"the log directories could not be opened: {error}"))

    async def _halt(self, halt: Halt | None) -> tuple[float, ZoneBundleError | None]:
        begin = time.monotonic()
        if halt is None:
            return 0.0, None
        try:
            await halt()
        except ZoneBundleError as error:
            return time.monotonic() - begin, error
        return time.monotonic() - begin, None

    async def _take_snapshots(self, conduct: _Conduct) -> dict[str, SharedSnapshot]:
        """The snapshots that the zone's logs need, alone or shared. What none can be taken of is staged instead."""
        if directories := conduct.begun.get("staging"):
            try:
                await self._staging.remember(directories)
            except OSError as error:
                # The intent and the record name the area as well: it is left behind only if neither can be written.
                _log.error("staging directories not noted; the stop goes on", reason=str(error))
        # One snapshot a bundle: its area's name is the bundle's. Logs on further subvolumes are staged by reflink.
        for group in conduct.begun.get("groups", [])[:1]:

            async def take(followers: list[str], group: str = group) -> SharedSnapshot:
                conduct.followers = tuple(followers)
                reply = await conduct.worker.call(
                    {"do": "snapshot", "group": group}, conduct.order.settings.budget + _MARGIN
                )
                return SharedSnapshot(reply["kind"], reply["area"], reply["leader"])

            try:
                return {group: await self._groups.share(group, conduct.order.intent.metadata.bundle_id, take)}
            except ZoneBundleError as error:
                _log.warning("snapshot failed; staging instead", zone=conduct.order.intent.zone.name, reason=str(error))
        return {}

    async def _record(
        self,
        conduct: _Conduct,
        graceful: float,
        snapshots: dict[str, SharedSnapshot],
        *,
        living: bool,
        remove: Callable[[], bool],
    ) -> tuple[bool, int]:
        """Stage, and make the record durable: (recorded, gaps)."""
        removed = await self._note_removal(conduct, remove)
        for _ in range(2):
            if conduct.worker.is_lost:
                await self._replace_worker(conduct, "the worker that held the zone hung")
            finish = FinishOrder(
                graceful=graceful,
                living=living,
                durable=removed,
                remove=removed,
                snapshots=snapshots,
                followers=conduct.followers,
                gaps=tuple(conduct.gaps),
            )
            try:
                async with self._turns.take(ahead=True):
                    reply = await conduct.worker.call({"do": "finish", "order": finish.to_json()}, _RECORD_PATIENCE)
                return True, reply["gaps"]
            except HostError as error:
                conduct.gaps.append(Gap("record", str(error)))
                _log.error("capture record not written", zone=conduct.order.intent.zone.name, reason=str(error))
        return False, len(conduct.gaps)

    async def _note_removal(self, conduct: _Conduct, remove: Callable[[], bool]) -> bool:
        """Whether the zone is to be removed; durably noted where only a stop that joined has asked for it."""
        intent = conduct.order.intent
        if intent.remove or not remove():
            return intent.remove
        try:
            await self._spool.write_intent(dataclasses.replace(intent, remove=True))
        except OSError as error:
            conduct.gaps.append(Gap("not-recoverable", f"the wish to remove the zone could not be noted: {error}"))
        return True


def _runs_commands(settings: HoldSettings) -> bool:
    return bool(settings.commands) or (settings.stacks == "user" and stack_tool() is not None)
