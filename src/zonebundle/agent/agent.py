"""The agent: wires runtimes, holds, the sealer and the store together, and recovers what the last one left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import structlog

from zonebundle.agent.ahead import Ahead
from zonebundle.agent.bundles import Bundles
from zonebundle.agent.catalogue import BundleEntry, BundleState, Catalogue
from zonebundle.agent.cleanup import Cleanup
from zonebundle.agent.config import Config
from zonebundle.agent.drain import Drains
from zonebundle.agent.recovery import Recovery, discard
from zonebundle.agent.state import StateDir
from zonebundle.agent.store_dirs import StoreDirs
from zonebundle.agent.wiring import hold_settings, make_runtimes
from zonebundle.agent.zone_runner import ZoneRunner
from zonebundle.capture.capture import Captured, Capturer
from zonebundle.capture.order import HoldSettings
from zonebundle.capture.spool import Spool
from zonebundle.capture.workers import HoldWorkers
from zonebundle.errors import NoSuchZoneError, RuntimeUnavailableError, ZoneBundleError
from zonebundle.model.record import Intent
from zonebundle.model.report import Gap
from zonebundle.model.retention import CleanupContext
from zonebundle.model.zone import LogTree, Zone
from zonebundle.runtimes.base import Runtime
from zonebundle.seal.link import SealerLink
from zonebundle.seal.storage import INDEX

_log = structlog.get_logger()

# Zones in one message to a hold worker, whose size is bounded.
_LESSON = 20


class Agent:
    """One agent on one state directory. `start` recovers and gets ready, `close` lets the zones run on."""

    def __init__(self, config: Config) -> None:
        self._config = config
        # For everything that is not the stop path: state files, recovery, reads of bundles.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="agent")
        # On the stop path, when a new staging directory comes up: nothing else may be before it.
        self._state_thread = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._state = StateDir(config.agent.state_dir, self._state_thread)
        self._spool = Spool(config.agent.state_dir)
        self._stores = StoreDirs(config.store.dirs)
        self._workers = HoldWorkers(module="zonebundle.agent.hold_server")
        self._runtimes: list[Runtime] = []
        self._runners: dict[str, ZoneRunner] = {}
        self._catalogue = Catalogue()
        self.installation = ""

    async def start(self) -> None:
        """Lock the state, open the store, start the children, recover. Raises ZoneBundleError with one clear line."""
        self._state.open()
        try:
            self.installation = self._state.installation
            self._settings = hold_settings(self._config, self.installation)
            self._spool.open()
            self._state.remember_stores(self._stores.open(self._state.stores))
            self._runtimes = make_runtimes(self._config)
            self._capturer = Capturer(self._workers, self._spool, self._state)
            self._link = SealerLink(
                state_dir=self._config.agent.state_dir,
                store_dirs=self._config.store.dirs,
                quota=self._config.store.quota,
                installation=self.installation,
                workers=self._config.seal.workers,
                on_event=self._on_sealer_event,
            )
            self.bundles = Bundles(self._catalogue, self._stores, self._spool, self._link, self._threads)
            first = self._config.cleanup
            context = CleanupContext(first.period, first.storage_limit, first.priority)
            self.cleanup = Cleanup(self._state.path, context, self._link, self.bundles, self._threads)
            self.drains = Drains(
                self._link,
                self.bundles.downloads,
                self._stores,
                spool=str(self._spool.path),
                staging=lambda: [*self._state.staging, *self._config.staging.values()],
            )
            self._ahead = Ahead(
                self._config.seal.ahead,
                self._runtimes,
                lambda lists: [(self.with_archives(zone), is_stopping) for zone, is_stopping in self._name(lists)],
                self._link,
                self._settings.limits.file,
            )
            await self._workers.start()
            await self.bundles.load()
            recovery = Recovery(self._spool, self._state, self.installation, self._threads)
            interrupted = await recovery.run(self._catalogue)
            for intent in (*interrupted, *recovery.unremoved):
                self.drains.begin_capture(intent)
            await self._link.start()
            for bundle_id in recovery.recorded:
                self._link.seal(bundle_id)
            await self.cleanup.start()
            await self._warm_up()
            self._ahead.start()
            self._resuming = [asyncio.create_task(self._resume(intent)) for intent in interrupted]
            self._resuming += [asyncio.create_task(self._finish_removal(intent)) for intent in recovery.unremoved]
        except OSError as error:
            await self.close()
            raise ZoneBundleError(f"the agent cannot start: {error}") from error
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let stops and bundles on their way come to their safe point, then end the children. Zones run on."""
        await asyncio.gather(*(runner.settle() for runner in self._runners.values()))
        for task in getattr(self, "_resuming", []):
            task.cancel()
        if hasattr(self, "drains"):
            await self.cleanup.close()
            await self.drains.close()
        if hasattr(self, "_ahead"):
            await self._ahead.close()
        if hasattr(self, "_link"):
            await self._link.close()
        await self._workers.close()
        for runtime in self._runtimes:
            await runtime.close()
        self._spool.close()
        self._threads.shutdown(wait=True)
        self._state_thread.shutdown(wait=True)
        self._stores.close()
        self._state.close()

    async def _warm_up(self) -> None:
        """Before the first stop: how will the logs of each zone be kept? What is slow or bounded is worth a warning."""
        try:
            zones = [zone for zone, _ in await self.zones()]
        except ZoneBundleError as error:
            # Zones of other runtimes can be had all the same, and these when their runtime is back.
            _log.warning("zones cannot be listed", reason=str(error))
            return
        lessons = [
            {
                "do": "warm",
                "zones": [self.with_archives(zone).to_json() for zone in zones[first : first + _LESSON]],
            }
            for first in range(0, len(zones), _LESSON)
        ]
        lesson = await self._workers.warm(lessons, self._hold_settings())
        await self._state.remember(lesson.staging)
        for warning in lesson.warnings:
            _log.warning("logs will be copied", reason=warning)

    @property
    def pids(self) -> dict[str, list[int]]:
        """The processes of this agent, for the benchmarks and for /healthz."""
        return {
            "agent": [os.getpid()],
            "hold": self._workers.pids,
            "sealer": [self._link.pid] if self._link.pid else [],
        }

    async def zones(self) -> list[tuple[Zone, bool]]:
        """Every zone of every runtime, sorted by name, and whether it is being stopped.

        A runtime that is not there is logged and costs only its own zones; raises RuntimeUnavailableError if none is.
        """
        answers = await asyncio.gather(*(runtime.list() for runtime in self._runtimes), return_exceptions=True)
        missing = [answer for answer in answers if isinstance(answer, RuntimeUnavailableError)]
        if len(missing) == len(answers):
            raise missing[0]
        lists = []
        for runtime, answer in zip(self._runtimes, answers, strict=True):
            if isinstance(answer, RuntimeUnavailableError):
                _log.warning("zones of a runtime cannot be listed", runtime=runtime.name, reason=str(answer))
                continue
            if isinstance(answer, BaseException):
                raise answer
            lists.append(answer)
        return self._name(lists)

    def _name(self, lists: Sequence[Sequence[Zone]]) -> list[tuple[Zone, bool]]:
        """The zones of all runtimes by the names that they have here, sorted; and whether each is being stopped."""
        found: dict[str, Zone] = {}
        for zones in lists:
            for zone in zones:
                # Two runtimes with one name: the later is `<runtime>:<name>`.
                name = zone.name if zone.name not in found else f"{zone.runtime}:{zone.name}"
                found[name] = replace(zone, name=name)
        return [(zone, self._is_stopping(name)) for name, zone in sorted(found.items())]

    def _is_stopping(self, name: str) -> bool:
        runner = self._runners.get(name)
        return runner is not None and runner.is_stopping

    async def runner(self, name: str) -> ZoneRunner:
        """The runner of a zone; raises NoSuchZoneError. Answers at once for a zone that is known already."""
        known = self._runners.get(name)
        if known is not None:
            return known
        prefix, _, rest = name.partition(":")
        missing: RuntimeUnavailableError | None = None
        for runtime in self._runtimes:
            local = rest if prefix == runtime.name and rest else name
            try:
                found = await runtime.find(local)
            except RuntimeUnavailableError as error:
                # Another runtime may know it; if none does, this one might have.
                missing = missing or error
                continue
            if found is not None:
                return self._runners.setdefault(name, ZoneRunner(name, local, runtime, self))
        raise missing or NoSuchZoneError(name)

    def with_archives(self, zone: Zone) -> Zone:
        """The zone with the archive directories that hold its moved logs."""
        archives = tuple(
            LogTree(source=f"archive-{number}", path=os.path.join(directory, zone.name))
            for number, directory in enumerate(self._config.evidence.archives, start=1)
        )
        return replace(zone, logs=zone.logs + archives)

    async def admit(self, intent: Intent) -> None:
        """Let a capture begin; raises UnavailableError where its zone's logs are drained."""
        await self.drains.admit(intent)

    async def hold(
        self,
        intent: Intent,
        *,
        probe: bool,
        living: bool,
        halt: Callable[[], Coroutine[Any, Any, None]] | None = None,
        gaps: tuple[Gap, ...] = (),
        remove: Callable[[], bool] = bool,
    ) -> Captured:
        """Capture, and list the bundle from its first moment on."""
        bundle_id = intent.metadata.bundle_id
        self._catalogue.put(BundleEntry(intent.metadata, BundleState.CAPTURING))
        self.drains.begin_capture(intent)
        try:
            captured = await self._capturer.capture(
                intent, self._hold_settings(), probe=probe, living=living, halt=halt, gaps=gaps, remove=remove
            )
        except BaseException:
            self._catalogue.drop(bundle_id)
            self.drains.end_capture(bundle_id)
            raise
        if captured.recorded:
            self._catalogue.update(
                bundle_id,
                state=BundleState.SEALING,
                gaps=captured.gaps,
                hold_seconds=captured.hold_seconds,
                graceful_seconds=captured.graceful_seconds,
            )
        else:
            self._catalogue.drop(bundle_id)
            self.drains.end_capture(bundle_id)
        return captured

    def _hold_settings(self) -> HoldSettings:
        index = str(self._config.agent.state_dir / INDEX) if self._link.is_indexed else ""
        return replace(self._settings, index=index)

    def seal(self, bundle_id: str, captured: Captured) -> None:
        """Hand a released zone's evidence to the sealer, without waiting for it."""
        if captured.recorded:
            self._link.seal(bundle_id)
            self.drains.end_capture(bundle_id)

    async def forget(self, intent: Intent) -> None:
        """Leave nothing of a hold that failed and was answered so."""
        await asyncio.get_running_loop().run_in_executor(
            self._threads, discard, self._spool, self._state.staging, intent, self.installation
        )

    def _runner_of(self, intent: Intent) -> ZoneRunner:
        """The runner of exactly the runtime's zone that an intent names; raises NoSuchZoneError."""
        name = intent.metadata.zone
        for runtime in self._runtimes:
            if runtime.name == intent.zone.runtime:
                return self._runners.setdefault(name, ZoneRunner(name, intent.zone.name, runtime, self))
        raise NoSuchZoneError(name)

    async def _resume(self, intent: Intent) -> None:
        name = intent.metadata.zone
        try:
            await self._runner_of(intent).resume(intent)
        except NoSuchZoneError:
            # The zone is not configured any more, or its container is gone: its files are read from where they were.
            captured = await self.hold(intent, probe=False, living=False, gaps=(Gap("probes", "the zone is gone"),))
            self.seal(intent.metadata.bundle_id, captured)
        except Exception as error:
            _log.exception("could not finish an interrupted hold", zone=name, reason=str(error))
            reason = f"the interrupted hold could not be finished: {error}; the next start tries again"
            known = self._catalogue.get(intent.metadata.bundle_id)
            # Where only the removal failed, the bundle is on its way.
            if known is None or known.state is BundleState.CAPTURING:
                self._catalogue.put(BundleEntry(intent.metadata, BundleState.CAPTURING))
                self._on_sealer_event({"failed": {"id": intent.metadata.bundle_id, "reason": reason}})
            self.drains.end_capture(intent.metadata.bundle_id)

    async def _finish_removal(self, intent: Intent) -> None:
        """The evidence was recorded when the agent died: the zone goes, if it is still there, then the seal begins."""
        try:
            await self._runner_of(intent).finish_removal(intent)
        except NoSuchZoneError:
            pass
        except ZoneBundleError as error:
            _log.error("could not finish an interrupted removal", zone=intent.metadata.zone, reason=str(error))
        self._link.seal(intent.metadata.bundle_id)
        self.drains.end_capture(intent.metadata.bundle_id)

    def _on_sealer_event(self, event: dict[str, Any]) -> None:
        self.bundles.on_sealer_event(event)
        if "sealed" in event and self._spool.is_reserve_spent:
            # A full disk has room again, perhaps; nothing else tells.
            self._threads.submit(self._spool.refill_reserve)
