"""Start supervisors, hear from them whether the command was executed, and reap those that end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from zonebundle.errors import ConflictError, RuntimeFailedError
from zonebundle.host import proc
from zonebundle.host.files import make_private_directory, write_all
from zonebundle.host.process import built_environment
from zonebundle.model.zone import ProcessRef
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.killing import end
from zonebundle.runtimes.tree import SupervisedTree
from zonebundle.runtimes.waiting import ended, readable

_SUPERVISOR = str(Path(__file__).with_name("supervise.py"))
_AT_ONCE = 4
_LONGEST_ANSWER = 200
_LONGEST_COMPLAINT = 300
_TIMED_OUT = "late"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a supervisor is to run: a command, in a directory, with an environment and no more than that."""

    instance: str
    command: tuple[str, ...]
    root: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The form that supervise.py reads."""
        pairs = [f"{name}={value}" for name, value in self.environment.items()]
        return b"\0".join(
            os.fsencode(text) for text in (self.instance, self.root, str(len(self.command)), *self.command, *pairs)
        )


class Launcher:
    """Starts supervisors in threads and reaps those that are children of this process.

    They are let live when it closes: then nobody reaps them here any more, which a process that ends does not need.
    `python` is the interpreter they run in, `timeout` how many seconds one may take until the command is executed.
    """

    def __init__(self, *, python: str = sys.executable, timeout: float = 30.0) -> None:
        self._python = python
        self._timeout = timeout
        # Popen blocks its thread until the interpreter is executed; beyond a few at once they queue for the cores.
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="start")
        self._watched: dict[ProcessRef, int] = {}

    async def launch(self, zone: str, directory: Path, plan: Plan) -> None:
        """Start a supervisor for `zone` in its state directory; returns when its command has been executed.

        Raises ConflictError if another supervisor has the directory, RuntimeFailedError if the zone cannot be
        started. Not to be cancelled: shield it.
        """
        loop = asyncio.get_running_loop()
        try:
            spawned = await loop.run_in_executor(self._threads, self._spawn, zone, directory, plan.encode())
        except OSError as error:
            raise RuntimeFailedError(f"cannot start zone '{zone}': no supervisor for it: {error}") from error
        supervisor, pidfd, answer = spawned
        self._watch(supervisor, pidfd)
        try:
            async with asyncio.timeout(self._timeout):
                await readable(answer)
                line = os.read(answer, _LONGEST_ANSWER).decode("ascii", "replace").strip()
                if line != "running":
                    await ended(supervisor)
        except TimeoutError:
            tree = SupervisedTree(supervisor)
            await end(tree, f"the supervisor of zone '{zone}'", Grace(0))
            line = f"{_TIMED_OUT} {self._timeout:g}"
        finally:
            os.close(answer)
        if line != "running":
            self.reap(supervisor)
            raise _failure(line, zone, directory, plan)

    def _spawn(self, zone: str, directory: Path, plan: bytes) -> tuple[ProcessRef, int, int]:
        """Start the process: itself, its pidfd, and the pipe with its answer."""
        make_private_directory(directory)
        with contextlib.ExitStack() as opened:

            def closing(descriptor: int) -> int:
                opened.callback(os.close, descriptor)
                return descriptor

            # A file in memory takes the whole plan at once; a pipe would wait for its reader.
            given = closing(os.memfd_create("plan", os.MFD_CLOEXEC))
            write_all(given, plan)
            os.lseek(given, 0, os.SEEK_SET)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            complaints = closing(os.open(directory / "supervisor.log", flags, 0o600))
            reader, writer = os.pipe2(os.O_CLOEXEC)
            closing(writer)
            try:
                process = subprocess.Popen(
                    [self._python, "-I", "-S", _SUPERVISOR, zone],
                    stdin=given,
                    stdout=writer,
                    stderr=complaints,
                    cwd=directory,
                    env=built_environment(),
                    start_new_session=True,
                )
            except BaseException:
                os.close(reader)
                raise
            # It is meant to outlive this process and is reaped by its pidfd: Popen need not care any more.
            process.returncode = 0
            # Not reaped yet, so the PID is still its own, even if it has ended.
            stat = proc.read_stat(process.pid)
            assert stat is not None
            return ProcessRef(process.pid, int(stat[proc.START_TIME])), os.pidfd_open(process.pid), reader

    def watch(self, supervisor: ProcessRef) -> None:
        """Reap the supervisor when it ends, should it be a child of this process."""
        if supervisor not in self._watched:
            descriptor = proc.open_pidfd(supervisor)
            if descriptor is not None:
                self._watch(supervisor, descriptor)

    def _watch(self, supervisor: ProcessRef, descriptor: int) -> None:
        if supervisor in self._watched:
            # Somebody looked at the zone before its start had ended.
            os.close(descriptor)
            return
        self._watched[supervisor] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self.reap, supervisor)

    def reap(self, supervisor: ProcessRef) -> None:
        """Reap a watched supervisor, if it has ended."""
        descriptor = self._watched.get(supervisor)
        if descriptor is None:
            return
        try:
            if os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG) is None and proc.is_alive(supervisor):
                return
        except ChildProcessError:
            if proc.is_alive(supervisor):
                return
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(self._watched.pop(supervisor))

    def close(self) -> None:
        """Stop watching; the supervisors and their zones go on. No launch may be under way."""
        for descriptor in self._watched.values():
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._watched.clear()
        self._threads.shutdown()


def _failure(answer: str, zone: str, directory: Path, plan: Plan) -> ConflictError | RuntimeFailedError:
    match answer.split():
        case ["busy"]:
            return ConflictError(f"zone '{zone}' runs already or is being started")
        case ["failed", stage, number]:
            reason = _explain(stage, int(number), directory, plan)
        case [word, seconds] if word == _TIMED_OUT:
            reason = f"'{plan.command[0]}' was not executed within {seconds} s"
        case _:
            reason = f"its supervisor ended at once: {_last_complaint(directory)}"
    return RuntimeFailedError(f"cannot start zone '{zone}': {reason}")


def _explain(stage: str, number: int, directory: Path, plan: Plan) -> str:
    why = os.strerror(number).lower()
    if stage == "state":
        return f"its state in {directory} cannot be written: {why}"
    if stage == "root":
        return f"its root '{plan.root}' cannot be entered: {why}"
    program = plan.command[0]
    hint = {
        errno.ENOENT: " (nor may the interpreter be missing that a script names in its first line)",
        errno.ENOEXEC: " (a script needs a first line such as #!/bin/sh)",
    }.get(number, "")
    return f"cannot execute '{program}': {why}{hint}"


def _last_complaint(directory: Path) -> str:
    try:
        lines = (directory / "supervisor.log").read_text(errors="replace").strip().splitlines()
    except OSError as error:
        lines = [f"{error}"]
    return lines[-1][-_LONGEST_COMPLAINT:] if lines else "it left no word; it may have been killed"
