"""What the supervisors leave in the state directory, and which of it still lives: so an agent finds its zones again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from zonebundle.errors import RuntimeFailedError
from zonebundle.host import proc
from zonebundle.host.process import run
from zonebundle.model.report import Outcome
from zonebundle.model.zone import Incarnation, Membership, ProcessRef
from zonebundle.runtimes.tree import ScatteredTree, Session, SupervisedTree, Tree
from zonebundle.runtimes.waiting import give_way

# The supervisor puts it into the environment of its zone's command.
MARK = "ZONE_BUNDLE_INSTANCE"
_LARGEST = 4096
_MARKED = str(Path(__file__).with_name("marked.py"))
_MARKED_TIMEOUT = 10.0
_LOOKS = 5
_MANY = 256

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a supervised zone, as run.json tells it; `instance` is a random ID."""

    boot_id: str
    instance: str
    supervisor: ProcessRef
    init: ProcessRef

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(self.boot_id, self.init, self.instance)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a zone's first process ended: with an exit status, or by a signal. `ended` is in seconds since the epoch."""

    incarnation: Incarnation
    status: int | None
    signal: int | None
    ended: float


@dataclass(frozen=True, slots=True)
class Sight:
    """A life that has not ended altogether, and its processes now, the init first if it lives.

    Without processes only the supervisor is left, which is about to go. Without a supervisor (somebody killed it)
    the processes were found by their session and their mark.
    """

    life: Life
    supervised: bool
    processes: tuple[ProcessRef, ...]

    @property
    def membership(self) -> Membership:
        """The zone's own processes. Of very many the supervisor stands for all: a description stays small."""
        if len(self.processes) > _MANY:
            return Membership(roots=(self.life.supervisor, *self.processes[:_MANY]))
        session = None if self.supervised or self.life.init not in self.processes else self.life.init.pid
        return Membership(roots=self.processes, session=session)

    def tree(self) -> Tree:
        """What a stop has to end."""
        if self.supervised:
            return SupervisedTree(self.life.supervisor)
        searches = [Marked(self.life.instance)]
        if self.life.init in self.processes:
            return ScatteredTree(self.processes, Session(self.life.init), *searches)
        return ScatteredTree(self.processes, *searches)


class Marked:
    """Search for the processes that carry an instance's mark in their environment.

    It finds what left the session and lost its parent, but not what was executed with another environment.
    """

    def __init__(self, instance: str) -> None:
        self._mark = f"{MARK}={instance}"

    async def __call__(self) -> list[ProcessRef]:
        """The marked processes. Raises RuntimeFailedError if they cannot be told."""
        done = await run([sys.executable, "-I", "-S", _MARKED, self._mark], timeout=_MARKED_TIMEOUT)
        if done.outcome is not Outcome.SUCCESS:
            raise RuntimeFailedError(f"cannot look for the processes marked {self._mark}: {done.detail}")
        pairs = [line.split() for line in done.output.decode("ascii").splitlines()]
        return [ProcessRef(int(pid), int(start_time)) for pid, start_time in pairs]


async def look(directory: Path) -> Sight | None:
    """What lives of the zone whose state is in `directory`; None if nothing does.

    Raises RuntimeFailedError if it cannot be told, OSError if the state cannot be read.
    """
    for _ in range(_LOOKS):
        await give_way()
        life = read_life(directory)
        if life is None:
            return None
        if life.boot_id != proc.boot_id():
            # Its PIDs belong to others now.
            _forget(directory, life)
            return None
        if proc.is_alive(life.supervisor):
            return Sight(life, True, await _children(life))
        # A supervisor removes run.json and goes: only one that was killed leaves it.
        if read_life(directory) == life:
            found = await _scattered(life)
            if found:
                return Sight(life, False, found)
            _forget(directory, life)
            if read_life(directory) in (None, life):
                return None
    raise RuntimeFailedError(f"cannot tell whether the zone in {directory} runs: it is started again and again")


async def _children(life: Life) -> tuple[ProcessRef, ...]:
    # While one child ends the kernel may leave out others: that there is none is believed the second time only.
    for _ in range(2):
        found = []
        for pid in proc.children(life.supervisor.pid):
            await give_way()
            if process := proc.identify(pid):
                found.append(process)
        if found:
            return tuple(sorted(found, key=lambda process: process != life.init))
    return ()


async def _scattered(life: Life) -> tuple[ProcessRef, ...]:
    found = dict.fromkeys([life.init] if proc.is_alive(life.init) else [])
    return tuple(found | dict.fromkeys(await Marked(life.instance)()))


def read_life(directory: Path) -> Life | None:
    """The life in run.json; None if there is none, or none that can be read (a power cut may leave such a file)."""
    data = _read_json(directory / "run.json")
    if data is None:
        return None
    try:
        return Life(str(data["boot_id"]), str(data["instance"]), _ref(data["supervisor"]), _ref(data["init"]))
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s/run.json is damaged and passed over: %s", directory, error)
        return None


def read_exit(directory: Path) -> Exit | None:
    """How the latest life's init ended, None if it has not, or it is not known."""
    data = _read_json(directory / "exit.json")
    if data is None:
        return None
    try:
        incarnation = Incarnation(str(data["boot_id"]), _ref(data["init"]), str(data["instance"]))
        return Exit(incarnation, _number(data["status"]), _number(data["signal"]), float(data["ended"]))
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s/exit.json is damaged and passed over: %s", directory, error)
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb", buffering=0) as file:
            data = file.read(_LARGEST)
    except FileNotFoundError:
        return None
    try:
        parsed = json.loads(data)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        log.warning("%s is damaged and passed over", path)
        return None
    return parsed


def _ref(data: dict[str, Any]) -> ProcessRef:
    return ProcessRef(int(data["pid"]), int(data["start_time"]))


def _number(data: object) -> int | None:
    return data if isinstance(data, int) else None


def _forget(directory: Path, life: Life) -> None:
    """Remove the run.json of a life that is over, unless another one has begun meanwhile."""
    try:
        with _locked(directory) as locked:
            if locked and read_life(directory) == life:
                (directory / "run.json").unlink()
    except OSError as error:
        # What it says is known to be over; the next look finds that out again.
        log.warning("a run.json that is over cannot be removed: %s", error)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """The lock that a supervisor holds while it lives; False if one does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
