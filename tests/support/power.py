"""Power cuts, and calls that fail on cue, at the n-th change that a piece of code makes to a filesystem.

`Changes` stands between the code and the kernel: it counts the calls that change files, and knows which bytes and which
names were not made durable yet. A crash kills the process before the n-th change, and takes with it what a power cut
could have taken.
"""

import contextlib
import io
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, TypeVar
from unittest import mock

from zonebundle.host import syscalls, trace

Loss = Literal["nothing", "bytes", "names", "names in segments", "names in bundles"]
"""What a crash costs: nothing (the process is killed), bytes that were not synced, or names that were not, too.

Nothing orders the names of two directories, so those of one may be lost and those of the other not.
"""

LOSSES: tuple[Loss, ...] = ("nothing", "bytes", "names", "names in segments", "names in bundles")
AnyPath = str | os.PathLike[str]
Report = Callable[[str], None]
"""Tells the test what was reached, from inside a child that may be killed at any moment."""


@dataclass
class Changes:
    """Every change below `directory`; before the n-th one, `act(n)` is called, which may raise or kill."""

    directory: Path
    graveyard: Path
    act: Callable[[int], None]
    count: int = 0
    unsynced_bytes: set[str] = field(default_factory=set)
    # What undoes a change of names, in the order of the changes, by the directory that has to be synced for it.
    unsynced_names: list[tuple[str, Callable[[], None]]] = field(default_factory=list)

    def cut_power(self, loss: Loss) -> None:
        """Lose what was not made durable."""
        if loss == "nothing":
            return
        for path in self.unsynced_bytes:
            REAL.truncate(path, 0)
        if loss.startswith("names"):
            part = str(self.directory / loss.removeprefix("names").removeprefix(" in "))
            for _, undo in reversed([change for change in self.unsynced_names if change[0].startswith(part)]):
                # A file whose next name, or a directory whose end, is durable has nothing to go back to.
                with contextlib.suppress(FileNotFoundError):
                    undo()

    def _happens(self) -> None:
        self.count += 1
        self.act(self.count)

    def _covers(self, path: str) -> bool:
        return path.startswith(f"{self.directory}/")

    def _note(self, path: str, undo: Callable[[], None]) -> None:
        self.unsynced_names.append((os.path.dirname(path), undo))

    def _synced(self, path: str) -> None:
        self.unsynced_bytes.discard(path)
        self.unsynced_names = [change for change in self.unsynced_names if change[0] != path]

    def open(self, path: AnyPath, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flags & os.O_CREAT or not self._covers(name := _resolve(path, dir_fd)):
            return REAL.open(path, flags, mode, dir_fd=dir_fd)
        self._happens()
        descriptor = REAL.open(path, flags, mode, dir_fd=dir_fd)
        self.unsynced_bytes.add(name)
        self._note(name, lambda: REAL.unlink(name))
        return descriptor

    def write(self, descriptor: int, data: bytes) -> int:
        if not self._covers(_path_of(descriptor)):
            return REAL.write(descriptor, data)
        # Half of it first: a crash or an error may leave a part.
        half = len(data) // 2
        REAL.write(descriptor, data[:half])
        self._happens()
        return half + REAL.write(descriptor, data[half:])

    def fdopen(self, descriptor: int, mode: str = "r", buffering: int = -1) -> IO[Any]:
        if mode != "wb":
            plain: IO[Any] = REAL.fdopen(descriptor, mode, buffering)
            return plain
        return io.BufferedWriter(_Raw(self, descriptor), buffering)

    def fsync(self, descriptor: int) -> None:
        path = _path_of(descriptor)
        if self._covers(path):
            self._happens()
            # It is the order that is tested; a real fsync would only take time.
            self._synced(path)

    def syncfs(self, descriptor: int) -> None:
        if self._covers(_path_of(descriptor)):
            self._happens()
            self.unsynced_bytes.clear()
            self.unsynced_names.clear()

    def rename(self, old: AnyPath, new: AnyPath) -> None:
        before, after = os.fspath(old), os.fspath(new)
        self._happens()
        REAL.rename(before, after)
        if before in self.unsynced_bytes:
            self.unsynced_bytes.discard(before)
            self.unsynced_bytes.add(after)
        # A later change undoes itself first, so the new name is still there, or again.
        self._note(after, lambda: REAL.rename(after, before))

    def unlink(self, path: AnyPath, *, dir_fd: int | None = None) -> None:
        name = _resolve(path, dir_fd)
        if not self._covers(name):
            REAL.unlink(path, dir_fd=dir_fd)
            return
        self._happens()
        grave = str(self.graveyard / str(self.count))
        REAL.link(name, grave)
        REAL.unlink(name)
        self.unsynced_bytes.discard(name)
        self._note(name, lambda: REAL.rename(grave, name))

    def mkdir(self, path: AnyPath, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        name = _resolve(path, dir_fd)
        if os.path.isdir(name):
            raise FileExistsError(name)
        self._happens()
        REAL.mkdir(name, mode)
        self._note(name, lambda: REAL.rename(name, str(self.graveyard / f"directory {os.urandom(4).hex()}")))

    def rmdir(self, path: AnyPath, *, dir_fd: int | None = None) -> None:
        name = _resolve(path, dir_fd)
        self._happens()
        REAL.rmdir(name)
        self._note(name, lambda: REAL.mkdir(name))


class _Raw(io.FileIO):
    """What a buffered writer writes into."""

    def __init__(self, changes: Changes, descriptor: int) -> None:
        super().__init__(descriptor, "wb")
        self._changes = changes

    def write(self, data: Any, /) -> int:
        return self._changes.write(self.fileno(), bytes(data))


class _Real:
    """The calls as they are without `Changes`."""

    open = staticmethod(os.open)
    write = staticmethod(os.write)
    fdopen: Any = staticmethod(os.fdopen)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    link = staticmethod(os.link)
    mkdir = staticmethod(os.mkdir)
    rmdir = staticmethod(os.rmdir)
    truncate = staticmethod(os.truncate)


REAL = _Real()


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _resolve(path: AnyPath, dir_fd: int | None) -> str:
    return os.fspath(path) if dir_fd is None else f"{_path_of(dir_fd)}/{os.fspath(path)}"


@contextlib.contextmanager
def watched(changes: Changes) -> Iterator[None]:
    """Every change that the body makes goes through `changes`."""
    with contextlib.ExitStack() as stack:
        for name in ("open", "write", "fdopen", "fsync", "rename", "unlink", "mkdir", "rmdir"):
            stack.enter_context(mock.patch.object(os, name, getattr(changes, name)))
        stack.enter_context(mock.patch.object(os, "fdatasync", changes.fsync))
        stack.enter_context(mock.patch.object(syscalls, "syncfs", changes.syncfs))
        yield


@dataclass(frozen=True)
class Crash:
    """How a child ended: whether it was killed on cue, and what it had reported until then."""

    killed: bool
    reports: list[str]


@dataclass(frozen=True)
class Place:
    """Where something happens that changes files below `directory`; a scene adds what is there."""

    directory: Path
    graveyard: Path


P = TypeVar("P", bound=Place)
Failing = Callable[[], AbstractContextManager[None]]


def crash_before_every_change(
    base: Path,
    loss: Loss,
    make: Callable[[Path], P],
    play: Callable[[P, Report], None],
    check: Callable[[P, Crash], None],
) -> list[Crash]:
    """Crash `play(place, report)` before each of its changes, each time in a new place, and check what is there then.

    Returns how each ended: the last one in peace, because there was no further change.
    """
    crashes = []

    def attempt(place: P, number: int) -> bool:
        crashes.append(crash(lambda report: play(place, report), place.directory, place.graveyard, number, loss))
        check(place, crashes[-1])
        return crashes[-1].killed

    _until_the_last_change(base, make, attempt)
    return crashes


def fail_every_change(base: Path, error: int, make: Callable[[Path], P], play: Callable[[P, Failing], None]) -> int:
    """Have each change that `play(place, failing)` makes `with failing()` fail once, each time in a new place.

    `error` is the errno. Returns how often it was played, the last time without an error.
    """

    def attempt(place: P, number: int) -> bool:
        def act(count: int) -> None:
            if count == number:
                raise OSError(error, os.strerror(error))

        changes = Changes(place.directory, place.graveyard, act)
        play(place, lambda: watched(changes))
        return changes.count >= number

    return _until_the_last_change(base, make, attempt)


def _until_the_last_change(base: Path, make: Callable[[Path], P], attempt: Callable[[P, int], bool]) -> int:
    number, has_more = 0, True
    while has_more:
        number += 1
        place = make(base / str(number))
        try:
            has_more = attempt(place, number)
        except BaseException as error:
            error.add_note(f"at change {number}")
            raise
        shutil.rmtree(base / str(number))
    return number


def crash_at(point: str, body: Callable[[Report], None]) -> Crash:
    """Run `body(report)` in a child that is killed at a trace point, `name` or `name:n`, which it has to reach."""

    def play(report: Report) -> None:
        name, _, count = point.partition(":")
        trace._name, trace._left = name, int(count or 1)
        body(report)

    ended = in_child(play)
    assert ended.killed, f"{point} was not reached"
    return ended


def crash(body: Callable[[Report], None], directory: Path, graveyard: Path, number: int, loss: Loss) -> Crash:
    """Run `body(report)` in a child that dies before its `number`-th change below `directory`, and loses `loss`.

    Where there are fewer changes it ends in peace, and the power is cut then.
    """

    def act(count: int) -> None:
        if count == number:
            changes.cut_power(loss)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(report: Report) -> None:
        with watched(changes):
            body(report)
        changes.cut_power(loss)

    changes = Changes(directory, graveyard, act)
    return in_child(watch)


def in_child(body: Callable[[Report], None]) -> Crash:
    """Run `body(report)` in a forked child; an exception there is one here."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Of a test runner's threads there is none in the child, which needs nothing from them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _be_child(body, writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        reports = pipe.read().splitlines()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return Crash(True, reports)
    assert os.waitstatus_to_exitcode(status) == 0, "\n".join(reports)
    return Crash(False, reports)


def _be_child(body: Callable[[Report], None], writing: int) -> NoReturn:
    try:
        body(lambda text: _say(writing, text))
    except BaseException as error:
        import traceback

        _say(writing, "".join(traceback.format_exception(error)))
        os._exit(1)
    finally:
        sys.stdout.flush()
    os._exit(0)


def _say(writing: int, text: str) -> None:
    REAL.write(writing, text.encode() + b"\n")
