"""Whether a directory answers: what hangs is left alone, what is slow is waited for."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from support import leaks, wait
from zonebundle.errors import SilentError
from zonebundle.store import watch as watch_module
from zonebundle.store.store import prepare
from zonebundle.store.watch import Watch, begin, do_in, in_batches

T = TypeVar("T")
TIMEOUT = 30.0


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr(watch_module, "_PATIENCE", 0.05)
    # What answers does so in time, however busy the machine is.
    monkeypatch.setattr(watch_module, "_WRITE_PATIENCE", TIMEOUT)
    prepare(tmp_path)
    with leaks.no_leaks():
        yield Watch(tmp_path)


class Hanging:
    """Whatever makes a file durable waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        fsync = os.fsync

        def hang(descriptor: int) -> None:
            assert self.go_on.wait(TIMEOUT)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", hang)


def test_what_is_slow_is_waited_for(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = threading.Semaphore(0)
    fsync = os.fsync

    def count(descriptor: int) -> None:
        fsync(descriptor)
        tests.release()

    monkeypatch.setattr(os, "fsync", count)

    def work() -> str:
        for _ in range(3):
            assert tests.acquire(timeout=TIMEOUT)
        return "done"

    assert watch.do(work) == "done"
    assert not watch.is_silent


def test_what_does_not_answer_is_left_until_it_does(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_WRITE_PATIENCE", 0.1)
    hanging = Hanging(monkeypatch)
    done: list[bool] = []
    with pytest.raises(SilentError, match="does not answer"):
        watch.do(lambda: done.append(hanging.go_on.wait(TIMEOUT)))
    assert watch.is_silent
    assert not watch.answers()
    # Nothing more is begun.
    with pytest.raises(SilentError, match="does not answer"):
        watch.do(lambda: done.append(False))
    hanging.go_on.set()
    wait.until(lambda: not watch.is_silent, TIMEOUT, "all has returned")
    assert done == [True]


def look(watch: Watch, work: Callable[[], T]) -> T:
    done: Future[T] = Future()
    begin(work, done, watch, "look at")
    return watch.look(done)


def test_a_look_has_little_time(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    with pytest.raises(SilentError):
        look(watch, lambda: go_on.wait(TIMEOUT))
    # A write would be answered all the same: the look is what has to return.
    assert watch.answers()
    assert watch.is_silent
    go_on.set()
    wait.until(lambda: not watch.is_silent, TIMEOUT, "it has returned")
    monkeypatch.setattr(watch_module, "_PATIENCE", TIMEOUT)
    assert look(watch, lambda: 1) == 1


def test_what_work_raises_is_told_and_is_an_answer(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "_PATIENCE", TIMEOUT)

    def fail() -> None:
        raise TimeoutError("of the disk's own")

    with pytest.raises(TimeoutError, match="of the disk's own"):
        watch.do(fail)
    with pytest.raises(TimeoutError, match="of the disk's own"):
        look(watch, fail)
    assert not watch.is_silent


def test_a_directory_that_is_gone_answers(watch: Watch) -> None:
    (watch.directory / "format").unlink(missing_ok=True)
    lost = Watch(watch.directory / "lost")
    assert lost.answers()


def test_only_the_one_that_hangs_is_silent(watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "other")
    other = Watch(tmp_path / "other")
    go_on = threading.Event()
    fsync = os.fsync

    def hang(descriptor: int) -> None:
        if "other" in os.readlink(f"/proc/self/fd/{descriptor}"):
            assert go_on.wait(TIMEOUT)
        fsync(descriptor)

    monkeypatch.setattr(watch_module, "_WRITE_PATIENCE", 2.0)
    monkeypatch.setattr(os, "fsync", hang)
    with pytest.raises(SilentError, match="other"):
        do_in([watch, other], lambda: go_on.wait(TIMEOUT))
    assert (watch.is_silent, other.is_silent) == (False, True)
    go_on.set()
    wait.until(lambda: not other.is_silent, TIMEOUT, "all has returned")


def test_a_long_list_is_fetched_in_parts(watch: Watch) -> None:
    threads = set()

    def listed() -> Iterator[int]:
        for number in range(2500):
            threads.add(threading.get_ident())
            yield number

    assert list(in_batches(listed, watch.do)) == list(range(2500))
    assert threading.get_ident() not in threads


def test_a_directory_that_is_alone_needs_no_threads(tmp_path: Path) -> None:
    alone = Watch(tmp_path, alone=True)
    places: list[str] = []
    alone.resolve(places.append)
    assert places[-1] == os.path.realpath(tmp_path)
    assert alone.do(threading.get_ident) == threading.get_ident()
    assert look(alone, threading.get_ident) == threading.get_ident()
