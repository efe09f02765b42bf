"""The agent's side of the hold workers: a pool that is never empty, and whose members can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import structlog

from zonebundle.capture.order import HoldSettings
from zonebundle.errors import HostError, UnavailableError
from zonebundle.host import trace
from zonebundle.host.channel import Channel, ChannelClosed, channel_pair
from zonebundle.host.process import built_environment

_log = structlog.get_logger()

_FORK_PATIENCE = 10.0
_LESSON_PATIENCE = 10.0


class WorkerDiedError(HostError):
    """The worker died, was killed or did not answer in time; what it had written to the spool is there."""


class _Process:
    """A worker process, and the holds that wait for its answers."""

    def __init__(self, channel: Channel, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.is_retired = False
        self.holds: dict[int, asyncio.Future[dict[str, Any]] | None] = {}
        self.calls: dict[int, int] = {}
        self._channel = channel
        self._pidfd = pidfd
        self._told: HoldSettings | None = None
        self._receiver = asyncio.get_running_loop().create_task(self._receive())

    async def _receive(self) -> None:
        try:
            while True:
                reply, descriptors = await self._channel.receive()
                for descriptor in descriptors:
                    os.close(descriptor)
                waiting = self.holds.get(reply["hold"])
                # An answer to a call that was given up must not pass for the next one's.
                if waiting is not None and not waiting.done() and reply["call"] == self.calls[reply["hold"]]:
                    waiting.set_result(reply)
        except (ChannelClosed, OSError, ValueError):
            self.is_retired = True
            for waiting in self.holds.values():
                if waiting is not None and not waiting.done():
                    waiting.set_exception(ChannelClosed("the worker died"))

    def take(self, number: int, *, exclusive: bool) -> HoldWorker:
        """Its service to one more hold, until `give_back`."""
        self.holds[number] = None
        self.calls[number] = 0
        return HoldWorker(self, number, exclusive)

    def give_back(self, worker: HoldWorker) -> None:
        del self.holds[worker.number], self.calls[worker.number]

    def send(self, message: dict[str, Any]) -> None:
        self._channel.send(message)

    def tell(self, settings: HoldSettings) -> None:
        """Have it know these settings, which hold from now on. Raises as `send`."""
        if settings != self._told:
            self.send({"do": "settings", "settings": settings.to_json()})
            self._told = settings

    def kill(self) -> None:
        """Kill it without waiting: one in uninterruptible sleep dies when the kernel lets it."""
        self.is_retired = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close our end; it exits, whatever its threads do."""
        self.is_retired = True
        self._receiver.cancel()
        self._channel.close()
        os.close(self._pidfd)


class HoldWorker:
    """A worker's service to one hold."""

    def __init__(self, process: _Process, number: int, exclusive: bool) -> None:
        self._process = process
        self.number = number
        self._exclusive = exclusive
        self.is_lost = False

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(
        self, message: dict[str, Any], timeout: float, settings: HoldSettings | None = None
    ) -> dict[str, Any]:
        """Send a request and return its reply. Raises WorkerDiedError; the hold is then lost there.

        `settings` are told before, where the worker does not know them: every zone's root is in them, and a hold must
        not cost more for there being more zones. Raises HostError for what the worker could not do. Cancelling loses
        the hold too.
        """
        waiting: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._process.holds[self.number] = waiting
        try:
            if settings is not None:
                self._process.tell(settings)
            self._process.calls[self.number] += 1
            self._process.send(message | {"hold": self.number, "call": self._process.calls[self.number]})
            reply = await asyncio.wait_for(waiting, timeout)
        except OSError as error:
            # ChannelClosed, TimeoutError and a full channel's BlockingIOError are all of this kind.
            self.lose()
            reason = f"did not answer within {timeout:.1f} s" if isinstance(error, TimeoutError) else "died"
            raise WorkerDiedError(f"hold worker {self.pid} {reason} during '{message['do']}'") from None
        except BaseException:
            self.lose()
            raise
        finally:
            self._process.holds[self.number] = None
        if reply["stuck"]:
            # A thread of it hangs in the kernel: no further holds, but this one may go on.
            self._process.is_retired = True
        if "error" in reply:
            raise HostError(reply["error"])
        return reply

    def notify(self, message: dict[str, Any]) -> None:
        """Tell the worker something it does not answer. A dead one is noticed at the next call."""
        with contextlib.suppress(ChannelClosed, OSError):
            self._process.send(message | {"hold": self.number})

    def lose(self) -> None:
        """Give the hold up there. The process gets no further ones; it is killed if it serves no others."""
        self.is_lost = True
        self._process.is_retired = True
        if self._exclusive:
            self._process.kill()


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a look at the logs of zones taught: what to warn of, and the staging directories that will be used."""

    warnings: list[str]
    staging: list[str]


class HoldWorkers:
    """Pre-started hold workers. A hold never waits for another's.

    A few processes, more than there are cores, are shared by all holds whose work is only looking and staging: forking
    one for each hold of a burst would cost more CPU than the hold itself. Holds that run commands have a process of
    their own, because a command's strays are found among the worker's orphans. A process in which a thread hangs gets
    no further holds, and goes when its last one has ended.
    """

    def __init__(self, shared: int | None = None, module: str = "zonebundle.capture.server") -> None:
        """`module` is run as the hold server."""
        self._module = module
        self._target = shared or 2 * (os.cpu_count() or 1)
        self._shared: list[_Process] = []
        self._spare: list[_Process] = []
        self._numbers = itertools.count(1)
        self._server: subprocess.Popen[bytes] | None = None
        self._control: Channel | None = None
        self._filling: asyncio.Task[None] | None = None
        self._lessons: list[dict[str, Any]] = []
        self._settings: HoldSettings | None = None
        self._closed = False

    async def start(self) -> None:
        """Start the hold server and the first workers. Raises UnavailableError."""
        await self._start_server()
        await self._fill()

    async def warm(self, lessons: list[dict[str, Any]], settings: HoldSettings) -> Lesson:
        """Have every worker, also later ones, learn how logs will be kept; returns what they learned.

        Each lesson is a `warm` message. A worker that does not learn in time (a hung file system) serves all the same.
        """
        self._lessons, self._settings = lessons, settings
        told = await asyncio.gather(*(self._teach(process) for process in [*self._shared, *self._spare]))
        return Lesson(
            sorted({warning for lesson in told for warning in lesson.warnings}),
            sorted({directory for lesson in told for directory in lesson.staging}),
        )

    async def _teach(self, process: _Process) -> Lesson:
        worker = process.take(next(self._numbers), exclusive=False)
        learned = Lesson([], [])
        try:
            for lesson in self._lessons:
                reply = await worker.call(lesson, _LESSON_PATIENCE, self._settings)
                learned.warnings.extend(reply["warnings"])
                learned.staging.extend(reply["staging"])
        except HostError as error:
            _log.warning("a hold worker could not look at the logs beforehand", reason=str(error))
        finally:
            process.give_back(worker)
        return learned

    @property
    def pids(self) -> list[int]:
        """The processes of the pool: the server and the workers at rest."""
        return ([self._server.pid] if self._server else []) + [process.pid for process in self._shared + self._spare]

    @contextlib.asynccontextmanager
    async def take(self, *, exclusive: bool = False) -> AsyncIterator[HoldWorker]:
        """A worker for one hold, `exclusive` if it runs commands. Raises UnavailableError if none can be forked."""
        process = await self._next(exclusive)
        worker = process.take(next(self._numbers), exclusive=exclusive)
        try:
            yield worker
        except BaseException:
            worker.lose()
            raise
        finally:
            worker.notify({"do": "drop"})
            process.give_back(worker)
            self._give_back(process, exclusive)

    async def _next(self, exclusive: bool) -> _Process:
        if exclusive:
            while self._spare:
                process = self._spare.pop()
                if not process.is_retired:
                    return process
                process.close()
            return await self._fork()
        self._shared = [process for process in self._shared if not self._bury(process)]
        usable = [process for process in self._shared if not process.is_retired]
        if usable:
            return min(usable, key=lambda process: len(process.holds))
        process = await self._fork()
        self._shared.append(process)
        return process

    def _give_back(self, process: _Process, exclusive: bool) -> None:
        if exclusive and not process.is_retired and not self._spare and not self._closed:
            self._spare.append(process)
        elif exclusive:
            process.close()
        elif self._bury(process):
            self._shared.remove(process)
        if not self._closed and (not self._spare or len(self._shared) < self._target) and self._filling is None:
            self._filling = asyncio.get_running_loop().create_task(self._fill())

    def _bury(self, process: _Process) -> bool:
        """End a retired process that serves nobody any more; whether it was one."""
        if process.is_retired and not process.holds:
            process.kill()
            process.close()
            return True
        return False

    async def _fill(self) -> None:
        try:
            while len(self._shared) < self._target:
                process = await self._fork()
                await self._teach(process)
                self._shared.append(process)
            if not self._spare:
                process = await self._fork()
                await self._teach(process)
                self._spare.append(process)
        except UnavailableError as error:
            if self._filling is None:
                raise
            _log.error("no hold worker can be forked", reason=str(error))
        finally:
            self._filling = None

    async def _start_server(self) -> None:
        ours, theirs = channel_pair()
        try:
            self._server = subprocess.Popen(  # noqa: ASYNC220 - vfork and exec: a millisecond, at start and after a crash
                [
                    *(sys.executable, "-m", self._module),
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

    async def _fork(self) -> _Process:
        for attempt in range(2):
            ours, theirs = channel_pair()
            channel = Channel(ours)
            try:
                if self._control is None or not self._server_lives():
                    _log.warning("hold server is gone; starting it again")
                    self._stop_server()
                    await self._start_server()
                assert self._control is not None
                try:
                    self._control.send({"fork": 1}, (theirs.fileno(),))
                except ChannelClosed:
                    # It has just ended, and may not be reaped yet.
                    self._stop_server()
                    raise
                theirs.close()
                hello, descriptors = await asyncio.wait_for(channel.receive(), _FORK_PATIENCE)
                return _Process(channel, hello["pid"], descriptors[0])
            except (ChannelClosed, OSError) as error:
                channel.close()
                theirs.close()
                if attempt:
                    raise UnavailableError(f"the hold server does not fork a worker: {error}") from None
                # The workers die with the server, so one that lives is left alone: this one fork failed (no memory,
                # no PIDs), or it is slow. One that has ended is started again above.
                _log.warning("the hold server did not fork a worker; once more", reason=str(error))
            except BaseException:
                channel.close()
                theirs.close()
                raise
        raise AssertionError("unreachable")

    def _server_lives(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def _stop_server(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    async def close(self) -> None:
        """End the workers and the server, and reap it."""
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        for process in self._shared + self._spare:
            process.close()
        self._shared.clear()
        self._spare.clear()
        self._stop_server()


def child_environment() -> dict[str, str]:
    """The environment of the agent's own children: built, and with what the crash tests need."""
    kept = ("PYTHONPATH", "PYTHONWARNINGS", trace.CRASH_AT)
    extra = {name: os.environ[name] for name in kept if name in os.environ}
    return built_environment(extra | {trace.CRASH_PID: str(os.getpid())})
