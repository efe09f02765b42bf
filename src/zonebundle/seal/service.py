"""The sealer process: takes orders from the agent over a socket, seals many bundles beside each other.

Messages are JSON, one a line. From the agent:

    {"seal": bundle ID}                                     seal this spool entry; told again, nothing changes
    {"delete": {"request": n, "zone": …, "id": …}}          delete a bundle, wherever it is on its way
    {"ask": {"request": n, "do": …, arguments}}             call a method of the upkeep (see ASKED)

To the agent; seconds and bytes:

    {"ready": true, "indexed": whether the index is of these stores, and may be asked by holds}
    {"progress": {"id": …, "bytes_total": …, "bytes_sealed": …}}        at most ten times a second a bundle
    {"sealed": {"id": …, "header": the manifest's, "size": of the tar.gz, "seal_seconds": …, "gaps": …}}
    {"failed": {"id": …, "reason": …, "retry_in": …}}                   null: not tried again before the next start
    {"stores": "changed"}                                               directories have come, or come back
    {"gone": {"id": …}}                                                 the entry was of a deleted bundle
    {"deleted": {"request": n, "freed": …}}  or  {"deleted": {"request": n, "error": …, "code": …}}
    {"answer": {"request": n, "result": …}}  or  {"answer": {"request": n, "error": …, "code": …}}

The durable spool entries are the queue: the agent sends what is in the spool after `ready`. When the socket closes, the
process ends at once: it has no state that it would lose.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from zonebundle.errors import (
    FormatError,
    NotFoundError,
    SealCanceledError,
    SnapshotError,
    StoreError,
    UsageError,
    ZoneBundleError,
)
from zonebundle.seal.report import describe
from zonebundle.seal.sealer import Progress, Sealed, Sealer
from zonebundle.seal.upkeep import Upkeep

T = TypeVar("T")
_log = structlog.get_logger()

# So many bundles are sealed at a time, each with its thread that reads: what they share is handed out in turns.
_AT_ONCE = 32
_PROGRESS_PAUSE = 0.1
# With so many bytes unread by the agent, progress is not told.
_UNREAD = 64 << 10
_FIRST_RETRY = 1.0
_LAST_RETRY = 60.0
_SETTLE_PAUSE = 5.0
_BLOCK = 64 << 10

ASKED = frozenset({"utilization", "plan_clean_up", "clean_up", "uses", "drain", "undrain", "repair", "prune", "ahead"})
"""The methods of Upkeep that the agent may ask for. Each may be repeated, and runs beside everything else."""
# A clean-up or a repair may take long, or hang with a disk: what a drain asks meanwhile is answered all the same.
_ASKS_AT_ONCE = 8


@dataclass(slots=True)
class _Job:
    """A bundle to be sealed. `is_working`: its thread runs, and ends by itself when `canceled` is set.

    `is_told`: the agent knows that it is in the store.
    """

    bundle_id: str
    canceled: threading.Event = field(default_factory=threading.Event)
    is_working: bool = False
    is_told: bool = False
    task: asyncio.Task[None] | None = None


class Service:
    """Serves one agent until its end of the socket closes."""

    def __init__(
        self, sealer: Sealer, upkeep: Upkeep, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._sealer = sealer
        self._upkeep = upkeep
        self._reader = reader
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="seal")
        # Deletions are not stuck behind seals.
        self._removals = ThreadPoolExecutor(2, thread_name_prefix="remove")
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._jobs: dict[str, _Job] = {}
        self._asks = ThreadPoolExecutor(_ASKS_AT_ONCE, thread_name_prefix="ask")
        # It may hang with a zone's file system for good: one thread for that, one to say that it is busy.
        self._ahead = ThreadPoolExecutor(2, thread_name_prefix="ahead")
        self._is_catching_up = False
        self._deleting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Recover, say that we are ready, and serve. Returns when the agent has closed its end, or died."""
        await self._recover()
        self._send({"ready": True, "indexed": self._sealer.is_indexed})
        settling = self._loop.create_task(self._settle())
        unread = bytearray()
        with contextlib.suppress(ConnectionError):
            # Not readline, which has a limit: a clean-up may be told thousands of bundles that it must not touch.
            while block := await self._reader.read(_BLOCK):
                unread += block
                *lines, unread = unread.split(b"\n") if b"\n" in block else [unread]
                for line in lines:
                    self._take(json.loads(line))
        settling.cancel()
        self._upkeep.stop()

    async def _recover(self) -> None:
        try:
            await self._in_thread(self._removals, self._sealer.recover)
        except (ZoneBundleError, OSError) as error:
            # Each seal tries to open the store again, and fails with the reason until it can.
            _log.warning("the store is not ready", reason=describe(error))

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"seal": str(bundle_id)}:
                if bundle_id not in self._jobs and bundle_id not in self._deleting:
                    job = self._jobs[bundle_id] = _Job(bundle_id)
                    job.task = self._loop.create_task(self._seal(job))
            case {"delete": {"request": request, "zone": str(zone), "id": str(bundle_id)}}:
                self._begin(self._delete(request, zone, bundle_id))
            case {"ask": {"request": request, "do": str(do), **arguments}}:
                self._begin(self._answer(request, do, arguments))
            case _:
                _log.error("not a message of this version's agent", message=message)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_thread(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(threads, work)

    async def _seal(self, job: _Job) -> None:
        """Seal until it is done and nothing is left; what fails is tried again, later and later."""
        pause = _FIRST_RETRY
        try:
            while True:
                retry: float | None = pause
                try:
                    sealed = await self._attempt(job)
                    if sealed is None:
                        self._send({"gone": {"id": job.bundle_id}})
                    if sealed is None or not sealed.left:
                        return
                    _log.warning("sealed, but not cleaned up", bundle=job.bundle_id, reason=sealed.left)
                except SealCanceledError:
                    return
                except Exception as error:
                    if isinstance(error, FormatError | NotFoundError | UsageError):
                        retry = None
                    elif not isinstance(error, ZoneBundleError | OSError):
                        _log.exception("seal failed unexpectedly", bundle=job.bundle_id)
                    if not job.is_told:
                        reason = describe(error)
                        self._send({"failed": {"id": job.bundle_id, "reason": reason, "retry_in": retry}})
                if retry is None or job.canceled.is_set():
                    return
                await asyncio.sleep(retry)
                pause = min(pause * 2, _LAST_RETRY)
        finally:
            if self._jobs.get(job.bundle_id) is job:
                del self._jobs[job.bundle_id]
            self._sweep_if_idle()

    async def _attempt(self, job: _Job) -> Sealed | None:
        def committed(sealed: Sealed) -> None:
            self._loop.call_soon_threadsafe(self._tell_sealed, job, sealed)

        async with self._slots:
            progress = self._progress(job.bundle_id)
            job.is_working = True
            try:
                return await self._in_thread(
                    self._threads,
                    lambda: self._sealer.seal(
                        job.bundle_id,
                        progress,
                        job.canceled,
                        committed,
                    ),
                )
            finally:
                job.is_working = False

    def _tell_sealed(self, job: _Job, sealed: Sealed) -> None:
        """Once: cleaning up may have to be tried again."""
        if job.is_told:
            return
        job.is_told = True
        told = {
            "id": job.bundle_id,
            "header": sealed.header.to_json(),
            "size": sealed.size,
            "seal_seconds": round(sealed.seconds, 6),
            "gaps": sealed.header.gaps,
        }
        self._send({"sealed": told})

    def _progress(self, bundle_id: str) -> Progress:
        """A function for the seal's thread."""
        next_time = 0.0

        def progress(total: int, done: int) -> None:
            nonlocal next_time
            now = time.monotonic()
            if now >= next_time:
                next_time = now + _PROGRESS_PAUSE
                told = {"id": bundle_id, "bytes_total": total, "bytes_sealed": done}
                self._loop.call_soon_threadsafe(self._send_progress, {"progress": told})

        return progress

    def _send_progress(self, message: dict[str, Any]) -> None:
        if self._writer.transport.get_write_buffer_size() < _UNREAD:
            self._send(message)

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n")

    async def _delete(self, request: int, zone: str, bundle_id: str) -> None:
        self._deleting.add(bundle_id)
        try:
            await self._end_job(bundle_id)
            freed = await self._in_thread(self._removals, lambda: self._sealer.delete(zone, bundle_id))
            self._send({"deleted": {"request": request, "freed": freed}})
        except Exception as error:
            self._send({"deleted": {"request": request, **_told_error(error, "deletion")}})
        finally:
            self._deleting.discard(bundle_id)
            self._sweep_if_idle()

    async def _answer(self, request: int, do: str, arguments: dict[Any, Any]) -> None:
        try:
            if do not in ASKED:
                raise UsageError(f"'{do}' is nothing that a sealer of this version does")
            threads = self._ahead if do == "ahead" else self._asks
            result = await self._in_thread(threads, lambda: getattr(self._upkeep, do)(**arguments))
            self._send({"answer": {"request": request, "result": result}})
        except Exception as error:
            self._send({"answer": {"request": request, **_told_error(error, do)}})

    async def _end_job(self, bundle_id: str) -> None:
        job = self._jobs.get(bundle_id)
        if job is None or job.task is None:
            return
        job.canceled.set()
        if not job.is_working:
            job.task.cancel()
        await asyncio.wait([job.task])

    async def _settle(self) -> None:
        """Look now and then whether what had to wait for others can be ended, and whether a store has come back."""
        while True:
            # A whole store may have to be copied: nothing else waits for it.
            if not self._is_catching_up:
                self._begin(self._catch_up())
            await asyncio.sleep(_SETTLE_PAUSE)
            try:
                await self._in_thread(self._removals, self._sealer.settle)
            except (SnapshotError, StoreError, OSError) as error:
                _log.warning("what was done with could not be removed", reason=describe(error))

    async def _catch_up(self) -> None:
        self._is_catching_up = True
        try:
            if await self._in_thread(self._asks, self._upkeep.catch_up):
                self._send({"stores": "changed"})
        except (ZoneBundleError, OSError) as error:
            _log.warning("store directories could not be brought up to date", reason=describe(error))
        finally:
            self._is_catching_up = False

    def _sweep_if_idle(self) -> None:
        if not self._jobs:
            self._removals.submit(self._sweep)

    def _sweep(self) -> None:
        try:
            self._sealer.sweep()
        except (ZoneBundleError, OSError) as error:
            _log.warning("segments of interrupted seals are left in the store", reason=describe(error))


def _told_error(error: Exception, what: str) -> dict[str, str]:
    """An error for a message. One that was not foreseen is logged where it happened: the agent sees its text alone."""
    if not isinstance(error, ZoneBundleError | OSError):
        _log.error(f"{what} failed unexpectedly", exc_info=error)
    code = error.code if isinstance(error, ZoneBundleError) else ZoneBundleError.code
    return {"error": describe(error), "code": code}
