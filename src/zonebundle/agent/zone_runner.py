"""One runner a zone: it alone starts, stops and bundles that zone, and answers for it at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog

from zonebundle.capture.capture import Captured
from zonebundle.errors import NoSuchZoneError, TerminatingError, UnavailableError, ZoneBundleError
from zonebundle.host import trace
from zonebundle.model.ids import new_bundle_id, snapshot_name
from zonebundle.model.metadata import Metadata, format_time
from zonebundle.model.record import Intent, Operation, metadata_for
from zonebundle.model.report import Gap
from zonebundle.model.zone import Zone
from zonebundle.runtimes.base import Grace, Runtime

_log = structlog.get_logger()


class Evidence(Protocol):
    """What a runner needs of the agent: to keep a zone's evidence, and to hand it to the sealer."""

    installation: str

    async def admit(self, intent: Intent) -> None: ...

    async def hold(
        self,
        intent: Intent,
        *,
        probe: bool,
        living: bool,
        halt: Callable[[], Coroutine[Any, Any, None]] | None = None,
        gaps: tuple[Gap, ...] = (),
        remove: Callable[[], bool] = ...,
    ) -> Captured: ...

    async def forget(self, intent: Intent) -> None: ...

    def with_archives(self, zone: Zone) -> Zone: ...

    def seal(self, bundle_id: str, captured: Captured) -> None: ...


@dataclass(frozen=True, slots=True)
class StopResult:
    """What a stop answers. `bundle` is None where none was wanted, or the zone was stopped already. Seconds."""

    zone: str
    bundle: Metadata | None
    hold_seconds: float
    stop_seconds: float
    gaps: tuple[Gap, ...] = ()
    gap_count: int = 0


@dataclass(slots=True)
class _Stopping:
    """A stop on its way, which a second one joins."""

    task: asyncio.Task[StopResult]
    grace: Grace
    bundle: bool
    remove: bool


class ZoneRunner:
    """The actor of one zone. Starts and creates wait for each other; a stop waits for neither."""

    def __init__(self, name: str, local: str, runtime: Runtime, evidence: Evidence) -> None:
        """`name` is the zone's among all runtimes, `local` the runtime's own."""
        self.name = name
        self._local = local
        self._runtime = runtime
        self._evidence = evidence
        self._stopping: _Stopping | None = None
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_stopping(self) -> bool:
        return self._stopping is not None

    async def find(self) -> Zone:
        """The zone as it is now; raises NoSuchZoneError."""
        zone = await self._runtime.find(self._local)
        if zone is None:
            raise NoSuchZoneError(self.name)
        return zone

    async def start(self) -> Zone:
        """Start the zone; raises ConflictError if it runs, TerminatingError while it is being stopped."""
        self._refuse_during_stop("start it when the stop has answered")
        async with self._turn:
            # A stop waits for no turn: one may have begun meanwhile.
            self._refuse_during_stop("start it when the stop has answered")
            return await self._runtime.start(self._local)

    def _refuse_during_stop(self, advice: str) -> None:
        if self._stopping is not None:
            raise TerminatingError(f"zone '{self.name}' is being stopped; {advice}")

    async def stop(self, grace: float, *, remove: bool = False, bundle: bool = True) -> StopResult:
        """Stop the zone and keep its evidence; joins a stop that is on its way.

        A joining stop may add removal, shorten the grace, and ask for a bundle where the first did not. Cancelling
        this call cancels nothing: the stop goes on.
        """
        if self._stopping is None:
            patience = Grace(grace)
            task = asyncio.get_running_loop().create_task(self._stop(patience, grace))
            self._stopping = _Stopping(task, patience, bundle, remove)
            task.add_done_callback(self._stop_ended)
        else:
            self._stopping.grace.shorten(grace)
            self._stopping.remove |= remove
            self._stopping.bundle |= bundle
        return await asyncio.shield(self._stopping.task)

    def _stop_ended(self, task: asyncio.Task[StopResult]) -> None:
        self._stopping = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("stop failed", zone=self.name, reason=str(error))

    async def _stop(self, grace: Grace, seconds: float) -> StopResult:
        begin = time.monotonic()
        zone = await self.find()
        assert self._stopping is not None
        asked = self._stopping
        if zone.state != "running":
            if asked.remove:
                await self._runtime.remove(zone)
            return StopResult(self.name, None, 0.0, time.monotonic() - begin)
        intent = self._intent(zone, "stop", seconds, asked.remove)
        captured: Captured | None
        if asked.bundle:
            # Refused, if at all, before the zone is touched.
            await self._evidence.admit(intent)
            captured = await self._hold_and_halt(intent, zone, grace)
        else:
            await self._runtime.stop(zone, grace)
            captured = await self._bundle_for_joiner(intent)
        failure = captured.failure if captured else None
        try:
            if asked.remove and failure is None and (captured is None or captured.recorded):
                await self._runtime.remove(zone)
                trace.point("stop.removed")
            trace.point("stop.released")
        finally:
            # Evidence that is safe is sealed, whatever became of the removal.
            if captured is not None:
                self._evidence.seal(intent.metadata.bundle_id, captured)
        if failure is not None:
            raise failure
        return self._result(intent, captured, begin)

    async def _bundle_for_joiner(self, intent: Intent) -> Captured | None:
        """Where somebody joined a stop without a bundle who wants one: what a stopped zone still has."""
        if self._stopping is None or not self._stopping.bundle:
            return None
        try:
            await self._evidence.admit(intent)
        except UnavailableError as error:
            return Captured(intent.metadata.bundle_id, False, 0.0, 0.0, 1, None, (Gap("bundle", str(error)),))
        late = Gap("probes", "the bundle was asked for when the stop was on its way already")
        return await self._evidence.hold(intent, probe=False, living=False, gaps=(late,))

    async def _hold_and_halt(self, intent: Intent, zone: Zone, grace: Grace) -> Captured:
        halted = False

        async def halt() -> None:
            nonlocal halted
            halted = True
            await self._runtime.stop(zone, grace)

        try:
            return await self._evidence.hold(intent, probe=True, living=False, halt=halt, remove=self._is_to_be_removed)
        except Exception as error:
            # Whatever is wrong with us, a defect too, the zone's owner asked for a stop and gets it.
            _log.exception("evidence lost; the stop goes on", zone=self.name, reason=str(error))
            if not halted:
                await self._runtime.stop(zone, grace)
            reason = Gap("bundle", f"no evidence could be kept: {error}")
            return Captured(intent.metadata.bundle_id, False, 0.0, 0.0, 1, None, (reason,))

    def _is_to_be_removed(self) -> bool:
        """Whether the stop on its way is to remove the zone: one that joins may ask for it until the record is made."""
        return self._stopping is not None and self._stopping.remove

    async def create(self) -> Metadata:
        """Bundle the zone as it is, living or stopped; returns at the release, before the seal.

        Raises TerminatingError during a stop. Cancelling this call cancels nothing.
        """
        self._refuse_during_stop("its bundle comes with the stop")
        task = asyncio.get_running_loop().create_task(self._create())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _create(self) -> Metadata:
        async with self._turn:
            self._refuse_during_stop("its bundle comes with the stop")
            zone = await self.find()
            intent = self._intent(zone, "create", 0.0, remove=False)
            await self._evidence.admit(intent)
            runs = zone.state == "running"
            captured = await self._evidence.hold(intent, probe=runs, living=runs)
            self._evidence.seal(intent.metadata.bundle_id, captured)
        if not captured.recorded:
            # It is answered with an error: the next start must not make it unasked, unless others read its snapshot.
            if not captured.followers:
                await self._evidence.forget(intent)
            reasons = "; ".join(gap.reason for gap in captured.reasons)
            raise ZoneBundleError(f"no bundle of zone '{self.name}' could be made: {reasons}")
        return intent.metadata

    async def resume(self, intent: Intent) -> None:
        """Finish what an agent that died had begun, for the incarnation that the intent names.

        A zone that runs again, as another incarnation, is not touched; what is left of the old one is bundled. An
        interrupted stop is a stop on its way: others join it.
        """
        _log.info("finishing", zone=self.name, operation=intent.operation, bundle=intent.metadata.bundle_id)
        grace = Grace(intent.grace)
        task = asyncio.get_running_loop().create_task(self._resume(intent, grace))
        if intent.operation == "stop" and self._stopping is None:
            self._stopping = _Stopping(task, grace, True, intent.remove)
            task.add_done_callback(self._stop_ended)
        await task

    async def _resume(self, intent: Intent, grace: Grace) -> StopResult:
        begin = time.monotonic()
        async with self._turn:
            zone = await self._runtime.find(self._local)
            runs = zone is not None and zone.state == "running"
            same = zone is not None and runs and zone.incarnation == intent.zone.incarnation
            if zone is not None and same:
                intent = replace(intent, zone=self._evidence.with_archives(zone))
                if intent.operation == "stop":
                    captured = await self._hold_and_halt(intent, zone, grace)
                else:
                    captured = await self._evidence.hold(intent, probe=True, living=True)
            else:
                captured = await self._evidence.hold(intent, probe=False, living=runs, gaps=(_lost(runs),))
            try:
                # Another incarnation is not ours to remove: the runtime compares a stopped one with the intent's.
                wanted = intent.remove or self._is_to_be_removed()
                done = captured.recorded and captured.failure is None
                if zone is not None and wanted and done and (same or not runs):
                    await self._runtime.remove(intent.zone)
            finally:
                self._evidence.seal(intent.metadata.bundle_id, captured)
        return self._result(intent, captured, begin)

    async def finish_removal(self, intent: Intent) -> None:
        """Remove the zone whose evidence an agent that died had recorded; not one that runs, or is another life."""
        async with self._turn:
            zone = await self._runtime.find(self._local)
            if zone is not None and zone.state != "running":
                # As the intent names it: the runtime compares.
                await self._runtime.remove(intent.zone)

    def _result(self, intent: Intent, captured: Captured | None, begin: float) -> StopResult:
        if captured is None:
            return StopResult(self.name, None, 0.0, time.monotonic() - begin)
        return StopResult(
            zone=self.name,
            bundle=intent.metadata if captured.recorded else None,
            hold_seconds=captured.hold_seconds,
            stop_seconds=time.monotonic() - begin,
            gaps=captured.reasons,
            gap_count=captured.gaps,
        )

    def _intent(self, zone: Zone, operation: Operation, grace: float, remove: bool) -> Intent:
        bundle_id = new_bundle_id()
        metadata = metadata_for(self.name, bundle_id, format_time(time.time()), operation)
        snapshot = snapshot_name(self._evidence.installation, bundle_id)
        return Intent(metadata, operation, self._evidence.with_archives(zone), snapshot, grace, remove)

    async def settle(self) -> None:
        """Wait until nothing is on its way."""
        tasks = [*self._tasks, *([self._stopping.task] if self._stopping else [])]
        await asyncio.gather(*tasks, return_exceptions=True)


def _lost(overtaken: bool) -> Gap:
    if overtaken:
        return Gap(
            "overtaken", "the agent died during the hold and the zone runs again: logs are as of now, probes lost"
        )
    return Gap("probes", "the agent died during the hold, and the zone had ended when it was back: probes are lost")
