"""The agent's side of the sealer: starts it, restarts it, asks it for work, hears what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

import zonebundle
from zonebundle.errors import (
    NoSuchBundleError,
    NotFoundError,
    StoreError,
    UnavailableError,
    UsageError,
    ZoneBundleError,
)
from zonebundle.host import trace
from zonebundle.host.process import built_environment

_log = structlog.get_logger()

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0
# A sealer that lived so long was fine: the next one is started without a pause.
_HEALTHY = 60.0
_EXIT_PATIENCE = 2.0
# Of the whole loop, when it has to end at once: by then the sealer has ended, or a disk that hangs keeps it.
_REAP_PATIENCE = 0.5

# Of one message: a clean-up names every bundle that it removed.
_LONGEST_MESSAGE = 64 << 20

Event = dict[str, Any]

# The errors that are told from each other by their code; any other is one of the store.
_ERRORS: dict[str, type[ZoneBundleError]] = {kind.code: kind for kind in (UsageError, UnavailableError)}


@dataclass(slots=True)
class _Request:
    """Something to be answered. `is_repeated`: it was told before, to a sealer that did not live to answer."""

    message: Event
    done: asyncio.Future[Any]
    is_told: bool = False
    is_repeated: bool = False

    def succeed(self, result: Any) -> None:
        if not self.done.done():
            self.done.set_result(result)

    def fail(self, error: ZoneBundleError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            # Its caller may have been cancelled.
            self.done.exception()


@dataclass(slots=True)
class _Deletion(_Request):
    """`was_pending`: the bundle was still to be sealed."""

    zone: str = ""
    bundle_id: str = ""
    was_pending: bool = False


class SealerLink:
    """One supervised sealer process. Belongs to one event loop, and never waits for the sealer in it.

    What it is to do is remembered here until the sealer has told its end, and told again to each new sealer: it may
    die, or be stopped, at any time. What is drained is told to each as it is started: it opens stores at once.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        store_dirs: Sequence[Path],
        quota: int | None = None,
        installation: str,
        workers: int = 0,
        on_event: Callable[[Event], None],
    ) -> None:
        """`workers` 0 is one a core. `on_event` gets what becomes of the bundles to be sealed."""
        self._arguments = [
            *("--state", str(state_dir)),
            *(argument for directory in store_dirs for argument in ("--store", str(directory))),
            *(("--quota", str(quota)) if quota is not None else ()),
            *("--installation", installation),
            *("--workers", str(workers)),
        ]
        self._on_event = on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._is_ready = False
        # Whether the index was found to be of these stores: only then may anybody else ask it.
        self.is_indexed = False
        self._to_seal: dict[str, None] = {}
        self._requests: dict[int, _Request] = {}
        self._numbers = itertools.count(1)
        self._drained: dict[str, None] = {}

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
        number = next(self._numbers)
        message = {"delete": {"request": number, "zone": zone, "id": bundle_id}}
        was_pending = bundle_id in self._to_seal
        self._to_seal.pop(bundle_id, None)
        freed: int = await self._request(
            number, _Deletion(message, _future(), zone=zone, bundle_id=bundle_id, was_pending=was_pending)
        )
        return freed

    async def ask(self, do: str, **arguments: Any) -> Any:
        """Have the sealer do something, and return its answer; waits for a sealer if there is none now.

        It is told again to a new sealer if this one dies, so it must be something that may be done twice. Raises the
        sealer's StoreError, UsageError or UnavailableError. Cancelling the call does not cancel what was asked.
        """
        number = next(self._numbers)
        message = {"ask": {"request": number, "do": do, **arguments}}
        return await self._request(number, _Request(message, _future()))

    async def drain(self, path: str) -> None:
        """Have this sealer, and every later one, use nothing below `path` that it does not use yet; as `ask`.

        Call neither this nor `undrain` before the call before has returned: the sealer may do them in any order.
        """
        self._drained[path] = None
        await self.ask("drain", path=path)

    async def undrain(self, path: str) -> None:
        """The opposite of `drain`."""
        self._drained.pop(path, None)
        await self.ask("undrain", path=path)

    async def _request(self, number: int, request: _Request) -> Any:
        self._requests[number] = request
        if self._is_ready:
            self._tell(request)
        return await asyncio.shield(request.done)

    async def close(self) -> None:
        """End the sealer, and reap it. What it was doing is done by the next one."""
        if self._supervision is not None:
            self._supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervision
            self._supervision = None
        for request in self._requests.values():
            request.fail(UnavailableError("the agent is stopping; ask again when it is back"))
        self._requests.clear()

    def _spawn(self) -> None:
        drained = (argument for path in self._drained for argument in ("--drained", path))
        command = [sys.executable, "-P", "-m", "zonebundle.seal", *self._arguments, *drained]
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
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise UnavailableError(f"the sealer cannot be started: {error}") from error
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
            except Exception as error:
                # Whatever it was: without supervision nothing would be sealed or deleted any more.
                _log.error("talking to the sealer failed unexpectedly", exc_info=error)
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
            for request in self._requests.values():
                request.is_repeated = request.is_told
            self._transport = None
            writer.transport.abort()

    def _take(self, message: Event) -> None:
        match message:
            case {"ready": _, "indexed": bool(is_indexed)}:
                self.is_indexed = is_indexed
                self._tell_all()
            case {"deleted": told}:
                self._end_deletion(told)
            case {"answer": told}:
                self._end_request(told)
            case _:
                match message:
                    case {"sealed": {"id": bundle_id}} | {"gone": {"id": bundle_id}}:
                        self._to_seal.pop(bundle_id, None)
                self._on_event(message)

    def _send(self, message: Event) -> None:
        """Never waits: what the sealer does not read yet is kept by the transport."""
        if self._transport is not None:
            self._transport.write(json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n")

    def _tell_all(self) -> None:
        self._is_ready = True
        for bundle_id in self._to_seal:
            self._send({"seal": bundle_id})
        for request in self._requests.values():
            self._tell(request)

    def _tell(self, request: _Request) -> None:
        request.is_told = True
        self._send(request.message)

    def _end_request(self, told: dict[str, Any]) -> None:
        request = self._requests.pop(told["request"])
        if "error" in told:
            request.fail(_ERRORS.get(told["code"], StoreError)(told["error"]))
        else:
            request.succeed(told["result"])

    def _end_deletion(self, told: dict[str, Any]) -> None:
        deletion = self._requests.pop(told["request"])
        assert isinstance(deletion, _Deletion)
        if "error" not in told or (deletion.is_repeated and told["code"] == NotFoundError.code):
            # The sealer that died, or the recovery of this one, had deleted it already.
            deletion.succeed(told.get("freed", 0))
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
        patience = _REAP_PATIENCE
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError as error:
            _log.error("the sealer's end cannot be waited for; it is killed", reason=str(error))
            self._process = None
            self._reap(process)
            return
        loop.add_reader(descriptor, exited.set)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(exited.wait(), _EXIT_PATIENCE)
            if not exited.is_set():
                process.kill()
                try:
                    await asyncio.wait_for(exited.wait(), _EXIT_PATIENCE)
                except TimeoutError:
                    # It has been waited for; stops are not to wait too.
                    patience = 0.0
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._process = None
            self._reap(process, patience)

    def _reap(self, process: subprocess.Popen[bytes], patience: float = _REAP_PATIENCE) -> None:
        # Cancelled again, we do not wait for it to end by itself.
        process.kill()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            _log.error("the sealer was killed and does not end: a disk hangs", pid=process.pid)
            threading.Thread(target=process.wait, name="reap the sealer", daemon=True).start()


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()
