"""The agent's side of the hold workers: a pool that is never empty, and whose members can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import structlog

from zonebundle.errors import HostError, UnavailableError
from zonebundle.host import trace
from zonebundle.host.channel import Channel, ChannelClosed, channel_pair
from zonebundle.host.process import built_environment

_log = structlog.get_logger()


class WorkerDiedError(HostError):
    """The worker died, was killed or did not answer in time; what it had written to the spool is there."""


@dataclass(slots=True)
class HoldWorker:
    """One hold worker, busy with one zone at a time."""

    channel: Channel
    pid: int
    pidfd: int
    spent: bool = False

    async def call(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and return its reply. Raises WorkerDiedError; the worker is then spent and killed.

        Cancelling leaves the worker in an unknown state: it is spent too.
        """
        try:
            self.channel.send(message)
            reply, descriptors = await asyncio.wait_for(self.channel.receive(), timeout)
        except (ChannelClosed, BlockingIOError, TimeoutError) as error:
            self.kill()
            reason = f"did not answer within {timeout:.1f} s" if isinstance(error, TimeoutError) else "died"
            raise WorkerDiedError(f"hold worker {self.pid} {reason} during '{message['do']}'") from None
        except BaseException:
            self.kill()
            raise
        for descriptor in descriptors:
            os.close(descriptor)
        if reply.get("spent"):
            self.spent = True
        if "error" in reply:
            raise HostError(reply["error"])
        return reply

    def notify(self, message: dict[str, Any]) -> None:
        """Tell the worker something it does not answer. A dead one is noticed at the next call."""
        with contextlib.suppress(ChannelClosed, BlockingIOError):
            self.channel.send(message)

    def kill(self) -> None:
        """Kill it without waiting: one in uninterruptible sleep dies when the kernel lets it."""
        self.spent = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        self.channel.close()
        os.close(self.pidfd)


class HoldWorkers:
    """Pre-started hold workers. A hold never waits for another's: with none idle, one more is forked.

    `idle` workers are kept ready; what is above that when a burst is over is let go.
    """

    def __init__(self, idle: int | None = None) -> None:
        self._idle_target = idle or max(4, 2 * (os.cpu_count() or 1))
        self._idle: list[HoldWorker] = []
        self._server: subprocess.Popen[bytes] | None = None
        self._control: Channel | None = None
        self._forking: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the hold server and the first workers."""
        await self._start_server()
        self._idle.extend(await asyncio.gather(*(self._fork() for _ in range(self._idle_target))))

    @property
    def pids(self) -> list[int]:
        """The processes of the pool: the server and the idle workers."""
        return ([self._server.pid] if self._server else []) + [worker.pid for worker in self._idle]

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[HoldWorker]:
        """A worker for one hold. Afterwards it is idle again, or gone if it is spent."""
        worker = self._next_idle() or await self._fork()
        try:
            yield worker
        except BaseException:
            worker.kill()
            raise
        finally:
            if worker.spent or self._closed or len(self._idle) >= self._idle_target:
                # Its end of the channel closes, and it exits.
                worker.close()
            else:
                self._idle.append(worker)
            self._refill()

    def _next_idle(self) -> HoldWorker | None:
        while self._idle:
            worker = self._idle.pop()
            if not _has_ended(worker.pidfd):
                return worker
            worker.close()
        return None

    def _refill(self) -> None:
        if not self._idle and not self._closed and not self._forking:
            task = asyncio.get_running_loop().create_task(self._add_idle())
            self._forking.add(task)
            task.add_done_callback(self._forking.discard)

    async def _add_idle(self) -> None:
        try:
            worker = await self._fork()
        except UnavailableError as error:
            _log.error("no hold worker can be forked", reason=str(error))
            return
        if self._closed:
            worker.close()
        else:
            self._idle.append(worker)

    async def _start_server(self) -> None:
        ours, theirs = channel_pair()
        try:
            self._server = subprocess.Popen(  # noqa: ASYNC220 - vfork and exec: a millisecond, at start and after a crash
                [
                    *(sys.executable, "-m", "zonebundle.capture.server"),
                    *("--fd", str(theirs.fileno()), "--agent", str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=child_environment(),
                cwd="/",
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._control = Channel(ours)

    async def _fork(self) -> HoldWorker:
        for attempt in range(2):
            ours, theirs = channel_pair()
            channel = Channel(ours)
            try:
                if self._control is None or self._server is None or self._server.poll() is not None:
                    _log.warning("hold server is gone; starting it again")
                    self._stop_server()
                    await self._start_server()
                assert self._control is not None
                self._control.send({"fork": 1}, (theirs.fileno(),))
                theirs.close()
                hello, descriptors = await asyncio.wait_for(channel.receive(), 10)
                return HoldWorker(channel, hello["pid"], descriptors[0])
            except (ChannelClosed, BlockingIOError, TimeoutError, OSError) as error:
                channel.close()
                theirs.close()
                if attempt:
                    raise UnavailableError(f"the hold server does not fork a worker: {error}") from None
                self._stop_server()
        raise AssertionError("unreachable")

    def _stop_server(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    async def close(self) -> None:
        """End the idle workers and the server, and reap it."""
        self._closed = True
        for task in self._forking:
            task.cancel()
        await asyncio.gather(*self._forking, return_exceptions=True)
        for worker in self._idle:
            worker.close()
        self._idle.clear()
        self._stop_server()


def child_environment() -> dict[str, str]:
    """The environment of the agent's own children: built, and with what the crash tests need."""
    kept = ("PYTHONPATH", "PYTHONWARNINGS", trace.CRASH_AT)
    extra = {name: os.environ[name] for name in kept if name in os.environ}
    return built_environment(extra | {trace.CRASH_PID: str(os.getpid())})


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])
