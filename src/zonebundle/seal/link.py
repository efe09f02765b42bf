"""The agent's side of the sealer: starts it, restarts it, tells it what to seal, hears what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

import zonebundle
from zonebundle.errors import NoSuchBundleError, NotFoundError, StoreError, UnavailableError, ZoneBundleError
from zonebundle.host import trace
from zonebundle.host.process import built_environment

_log = structlog.get_logger()

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0
# A sealer that lived so long was fine: the next one is started without a pause.
_HEALTHY = 60.0
_EXIT_PATIENCE = 2.0

# Of one message: an error in one line may hold two paths.
_LONGEST_MESSAGE = 1 << 20

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Deletion:
    """A deletion on its way. `was_pending`: the bundle was still to be sealed."""

    zone: str
    bundle_id: str
    was_pending: bool
    done: asyncio.Future[int]

    def fail(self, error: ZoneBundleError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            # Its caller may have been cancelled.
            self.done.exception()


class SealerLink:
    """One supervised sealer process. Belongs to one event loop, and never waits for the sealer in it.

    What is to be sealed or deleted is remembered here until the sealer has told its end, and told again to each new
    sealer: it may die, or be stopped, at any time.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        store_dir: Path,
        installation: str,
        workers: int = 0,
        on_event: Callable[[Event], None],
    ) -> None:
        """`workers` 0 is one a core. `on_event` gets the sealer's messages but for those about deletions."""
        self._arguments = [
            *("--state", str(state_dir)),
            *("--store", str(store_dir)),
            *("--installation", installation),
            *("--workers", str(workers)),
        ]
        self._on_event = on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._is_ready = False
        self._to_seal: dict[str, None] = {}
        self._to_delete: dict[int, _Deletion] = {}
        # Those of them that were told to a sealer which did not live to answer.
        self._repeated: set[int] = set()
        self._told: set[int] = set()
        self._requests = itertools.count(1)

    @property
    def pid(self) -> int | None:
        """The sealer's PID, None while there is none."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the sealer and its supervision; does not wait until it is ready. Raises UnavailableError."""
        self._spawn()
        self._supervision = asyncio.get_running_loop().create_task(self._supervise())

    def seal(self, bundle_id: str) -> None:
        """Have a recorded spool entry sealed. Returns at once."""
        self._to_seal[bundle_id] = None
        if self._is_ready:
            self._send({"seal": bundle_id})

    async def delete(self, zone: str, bundle_id: str) -> int:
        """Delete a bundle, sealed or on its way; returns the bytes freed. Waits for a sealer if there is none now.

        Raises NoSuchBundleError, StoreError. Cancelling the call does not cancel the deletion.
        """
        request = next(self._requests)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        was_pending = bundle_id in self._to_seal
        self._to_seal.pop(bundle_id, None)
        self._to_delete[request] = _Deletion(zone, bundle_id, was_pending, done)
        if self._is_ready:
            self._send_deletion(request)
        return await asyncio.shield(done)

    async def close(self) -> None:
        """End the sealer, and reap it. What it was doing is done by the next one."""
        if self._supervision is not None:
            self._supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervision
            self._supervision = None
        for deletion in self._to_delete.values():
            deletion.fail(UnavailableError("the agent is stopping; delete the bundle when it is back"))
        self._to_delete.clear()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-P", "-m", "zonebundle.seal", *self._arguments]
        environment = built_environment(
            {
                # The code that runs here, wherever it was found.
                "PYTHONPATH": str(Path(zonebundle.__file__).parents[1]),
                # Each thread's own heap would keep what it once needed.
                "MALLOC_ARENA_MAX": "2",
                trace.CRASH_PID: str(os.getpid()),
                **{name: os.environ[name] for name in (trace.CRASH_AT,) if name in os.environ},
            }
        )
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno()), "--agent", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    cwd="/",
                    pass_fds=(theirs.fileno(),),
                )
        except OSError as error:
            ours.close()
            raise UnavailableError(f"the sealer cannot be started: {error}") from error
        self._socket = ours

    async def _supervise(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            begin = time.monotonic()
            try:
                if self._process is None:
                    self._spawn()
                await self._talk()
            except UnavailableError as error:
                _log.error("no sealer", reason=str(error))
            finally:
                # Also when this task is cancelled.
                await self._end_process()
            lived = time.monotonic() - begin
            pause = _FIRST_PAUSE if lived > _HEALTHY else pause
            _log.warning("the sealer ended and is started again", lived=round(lived, 3), pause=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _talk(self) -> None:
        """Take the sealer's messages until it closes its end, or dies."""
        reader, writer = await asyncio.open_unix_connection(sock=self._socket, limit=_LONGEST_MESSAGE)
        self._transport = writer.transport
        try:
            with contextlib.suppress(ConnectionError):
                while line := await reader.readline():
                    # A line that a dying sealer did not finish.
                    if line.endswith(b"\n"):
                        self._take(json.loads(line))
        finally:
            self._is_ready = False
            self._repeated |= self._told
            self._transport = None
            writer.transport.abort()

    def _take(self, message: Event) -> None:
        match message:
            case {"ready": _}:
                self._is_ready = True
                for bundle_id in self._to_seal:
                    self._send({"seal": bundle_id})
                for request in self._to_delete:
                    self._send_deletion(request)
            case {"deleted": told}:
                self._end_deletion(told)
            case _:
                match message:
                    case {"sealed": {"id": bundle_id}} | {"gone": {"id": bundle_id}}:
                        self._to_seal.pop(bundle_id, None)
                self._on_event(message)

    def _send(self, message: Event) -> None:
        """Never waits: what the sealer does not read yet is kept by the transport."""
        if self._transport is not None:
            self._transport.write(json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n")

    def _send_deletion(self, request: int) -> None:
        self._told.add(request)
        deletion = self._to_delete[request]
        self._send({"delete": {"request": request, "zone": deletion.zone, "id": deletion.bundle_id}})

    def _end_deletion(self, told: dict[str, Any]) -> None:
        request = told["request"]
        deletion = self._to_delete.pop(request)
        is_repeated = request in self._repeated
        self._told.discard(request)
        self._repeated.discard(request)
        if "error" not in told or (is_repeated and told["code"] == NotFoundError.code):
            # The sealer that died, or the recovery of this one, had deleted it already.
            if not deletion.done.done():
                deletion.done.set_result(told.get("freed", 0))
        elif told["code"] == NotFoundError.code:
            deletion.fail(NoSuchBundleError(deletion.zone, deletion.bundle_id))
        else:
            deletion.fail(StoreError(told["error"]))
            if deletion.was_pending:
                self.seal(deletion.bundle_id)

    async def _end_process(self) -> None:
        """Wait for its end, kill it if need be, reap it."""
        process = self._process
        if process is None:
            return
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        descriptor = os.pidfd_open(process.pid)
        loop.add_reader(descriptor, exited.set)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(exited.wait(), _EXIT_PATIENCE)
            if not exited.is_set():
                process.kill()
                await exited.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._process = None
            # Cancelled again, we do not wait for it to end by itself.
            process.kill()
            process.wait()
