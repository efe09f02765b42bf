"""Run a process within bounds: of time, of output, of what it may leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zonebundle.host import proc
from zonebundle.model.report import Outcome
from zonebundle.model.zone import Membership, ProcessRef

DEFAULT_LIMIT = 1 << 20
_READ = 64 << 10
# How long a pipe may stay open after its process has ended before the rest of the group is killed for it.
_LINGER = 0.05
# How long a killed process is waited for.
_REAP = 1.0


@dataclass(frozen=True, slots=True)
class Completed:
    """How a process ended. `status` is its exit status, negative a signal's number, None if it could not be started.

    `output` is what was read until then, at most the limit; `errors` its stderr where that was kept apart.
    """

    argv: tuple[str, ...]
    outcome: Outcome
    status: int | None
    output: bytes
    errors: bytes
    truncated: bool
    seconds: float
    detail: str

    @property
    def command_line(self) -> str:
        """The command so that it can be pasted into a shell."""
        return shlex.join(self.argv)


class _Pipe:
    """The reading end of a child's output: keeps the first `limit` bytes and says when it is full or closed."""

    def __init__(self, limit: int) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_end, False)
        self.data = bytearray()
        self.limit = limit
        self.truncated = False
        self.closed = asyncio.Event()
        self.full = asyncio.Event()

    def watch(self) -> None:
        os.close(self.write_end)
        self.write_end = -1
        asyncio.get_running_loop().add_reader(self.read_end, self._read)

    def _read(self) -> None:
        try:
            chunk = os.read(self.read_end, _READ)
        except BlockingIOError:
            return
        if not chunk:
            self._finish()
            self.closed.set()
            return
        room = self.limit - len(self.data)
        self.data += chunk[:room]
        if len(chunk) > room:
            self.truncated = True
            self._finish()
            self.full.set()

    def drain(self) -> None:
        """Read what is there already, without waiting."""
        while not self.closed.is_set() and not self.full.is_set():
            before = len(self.data)
            self._read()
            if len(self.data) == before:
                break

    def _finish(self) -> None:
        asyncio.get_running_loop().remove_reader(self.read_end)

    def close(self) -> None:
        self._finish()
        os.close(self.read_end)
        if self.write_end >= 0:
            os.close(self.write_end)


async def run(
    argv: Sequence[str],
    *,
    timeout: float,
    limit: int = DEFAULT_LIMIT,
    environment: Mapping[str, str] | None = None,
    directory: str = "/",
    separate_errors: bool = False,
    grace: float = 0.2,
    started: Callable[[ProcessRef], None] | None = None,
) -> Completed:
    """Run `argv` in a session and process group of its own, with no stdin and a built environment.

    At most `limit` bytes of output are kept; a process that prints more is ended. After `timeout` seconds the whole
    group gets TERM, after `grace` more KILL, and so it does when this is cancelled. When the process has ended, what is
    left of its group is killed too, even where it holds the pipe. Always reaped; one that hangs in the kernel is left
    after a second and reaped later. Never raises for what the process does: a failure to start is an outcome. `started`
    is told the process as soon as it runs.
    """
    begin = time.monotonic()
    _reap_late()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(contextlib.closing(_Pipe(limit)))
        err = stack.enter_context(contextlib.closing(_Pipe(limit))) if separate_errors else None
        pipes = [pipe for pipe in (out, err) if pipe is not None]
        try:
            # No preexec_fn: it would force fork(2), slow from a large process and unsafe beside threads.
            process = subprocess.Popen(  # noqa: ASYNC220 - vfork and exec, a millisecond
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out.write_end,
                stderr=err.write_end if err else out.write_end,
                env=dict(environment if environment is not None else built_environment()),
                cwd=directory,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            detail = _cannot_start(argv, directory, error)
            return Completed(tuple(argv), Outcome.FAIL, None, b"", b"", False, time.monotonic() - begin, detail)
        for pipe in pipes:
            pipe.watch()
        outcome, detail = await _supervise(process, pipes, begin + timeout, timeout, grace, started)
        return Completed(
            argv=tuple(argv),
            outcome=outcome,
            status=process.returncode,
            output=bytes(out.data),
            errors=bytes(err.data) if err else b"",
            truncated=any(pipe.truncated for pipe in pipes),
            seconds=time.monotonic() - begin,
            detail=detail,
        )


async def _supervise(
    process: subprocess.Popen[bytes],
    pipes: list[_Pipe],
    deadline: float,
    timeout: float,
    grace: float,
    started: Callable[[ProcessRef], None] | None,
) -> tuple[Outcome, str]:
    exited = asyncio.Event()
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        _signal_group(process.pid, signal.SIGKILL)
        _unreaped.append(process)
        raise
    asyncio.get_running_loop().add_reader(pidfd, _note_exit, exited, pidfd)
    try:
        try:
            if started is not None and (fields := proc.read_stat(process.pid)) is not None:
                # Not reaped yet, so the PID is its own, even if it has ended already.
                started(ProcessRef(process.pid, int(fields[proc.START_TIME])))
            ended_by_itself, full = await _wait_first(exited, pipes, deadline)
            if ended_by_itself:
                await _within(_LINGER, _all_closed(pipes))
            else:
                await _ask_to_end(process, exited, grace)
        except (Exception, asyncio.CancelledError):
            await _ask_to_end(process, exited, grace)
            raise
    finally:
        await _kill(process, exited, pidfd)
    for pipe in pipes:
        pipe.drain()
    if full:
        return Outcome.UNKNOWN, f"ended: it printed more than {pipes[0].limit} bytes; the first are kept"
    if not ended_by_itself:
        left = " (it hangs in the kernel and is still there)" if process.returncode is None else ""
        return (
            Outcome.TIMEOUT,
            f"killed after {timeout:.3g} s with its process group; what it had printed is kept{left}",
        )
    if process.returncode == 0:
        return Outcome.SUCCESS, ""
    if process.returncode is not None and process.returncode < 0:
        return Outcome.FAIL, f"killed by signal {-process.returncode}"
    return Outcome.FAIL, f"exit status {process.returncode}"


def _note_exit(exited: asyncio.Event, pidfd: int) -> None:
    asyncio.get_running_loop().remove_reader(pidfd)
    exited.set()


async def _ask_to_end(process: subprocess.Popen[bytes], exited: asyncio.Event, grace: float) -> None:
    if not exited.is_set():
        _signal_group(process.pid, signal.SIGTERM)
        await _within(grace, exited.wait())


async def _kill(process: subprocess.Popen[bytes], exited: asyncio.Event, pidfd: int) -> None:
    """Kill the group and reap its leader; one that hangs in the kernel is left to be reaped by a later run."""
    try:
        # The leader is not reaped yet, so its group's number cannot have been given to anybody else.
        _signal_group(process.pid, signal.SIGKILL)
        await _within(_REAP, exited.wait())
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        if process.poll() is None:
            _unreaped.append(process)


async def _within(seconds: float, work: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, seconds)


# Killed, and not dead yet when they were last looked at.
_unreaped: list[subprocess.Popen[bytes]] = []


def _reap_late() -> None:
    _unreaped[:] = [process for process in _unreaped if process.poll() is None]


async def _wait_first(exited: asyncio.Event, pipes: list[_Pipe], deadline: float) -> tuple[bool, bool]:
    """Wait for the exit, a full pipe or the deadline: (exited by itself, a pipe is full)."""
    waits = {asyncio.ensure_future(exited.wait())} | {asyncio.ensure_future(pipe.full.wait()) for pipe in pipes}
    try:
        await asyncio.wait(waits, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return exited.is_set(), any(pipe.full.is_set() for pipe in pipes)


async def _all_closed(pipes: list[_Pipe]) -> None:
    for pipe in pipes:
        await pipe.closed.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _cannot_start(argv: Sequence[str], directory: str, error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return f"cannot run {argv[0]!r}: {error}"
    if error.filename == directory:
        return f"cannot run {argv[0]} in {directory}: {error.strerror}"
    if isinstance(error, FileNotFoundError):
        return f"cannot run {argv[0]}: no such program on this host"
    return f"cannot run {argv[0]}: {error.strerror}"


def built_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that children get: nothing is inherited but what finds programs and fixes the language."""
    environment = {
        "PATH": os.environ.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        "LC_ALL": "C.UTF-8",
        "HOME": os.environ.get("HOME", "/"),
    }
    return environment | dict(extra or {})


def kill_strays() -> int:
    """Kill and reap every descendant of this process; for a subreaper with no child that should live.

    Orphans come to the subreaper when their parent dies, so this repeats until none is left. Returns how many living
    ones it killed. A process in uninterruptible sleep is waited for no longer than a short bound.
    """
    killed = 0
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        left = proc.children(os.getpid())
        if not left:
            break
        for pid in left:
            # Children that we have not reaped keep their PIDs: a bare one is safe here.
            if proc.identify(pid) is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        for pid in left:
            _reap(pid, deadline)
    return killed


def kill_marked(membership: Membership, mark: str) -> int:
    """Kill the zone's processes that carry `mark` in their environment; returns how many.

    What a command forks inside a container and leaves is the container's orphan, not ours. Reading an environment can
    wait for a lock of its process: run it in a thread that can be abandoned.
    """
    killed: set[ProcessRef] = set()
    # Killed ones may be seen dying; a fork between the look and the kill is seen by the next look.
    while fresh := {process for process in proc.members(membership) if _is_marked(process, mark)} - killed:
        for process in fresh:
            with contextlib.suppress(PermissionError):
                proc.send_signal(process, signal.SIGKILL)
        killed |= fresh
    return len(killed)


def _is_marked(process: ProcessRef, mark: str) -> bool:
    try:
        return os.fsencode(mark) in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _reap(pid: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            done, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return
        if done:
            return
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            try:
                # Not select: it takes no descriptor above 1023.
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            finally:
                os.close(descriptor)
