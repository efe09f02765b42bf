"""Links and directories swapped in while host.files looks: whatever wins the race, nothing outside is read."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zonebundle.errors import HostError
from zonebundle.host.files import Found, open_regular_beneath, open_root, walk_beneath

pytestmark = pytest.mark.usefixtures("leak_check")

_SECONDS = 1.0
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step, so that there is no moment without either (renameat2)."""
    if _libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for directory, text in (("outside", "secret"), ("root", ""), ("root/var", ""), ("root/var/log", "inside")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "app.log").write_text(text)
    (tmp_path / "outside/log").mkdir()
    (tmp_path / "outside/log/app.log").write_text("secret")
    return tmp_path


@pytest.fixture(params=["final", "intermediate", "fifo"])
def swapping(request: pytest.FixtureRequest, place: Path) -> Iterator[str]:
    """A path below root, one part of which is swapped for a link or a FIFO, back and forth, as fast as can be."""
    match request.param:
        case "final":
            victim, trap = place / "root/var/log/app.log", place / "root/trap"
            trap.symlink_to(place / "outside/app.log")
        case "intermediate":
            victim, trap = place / "root/var", place / "root/trap"
            trap.symlink_to(place / "outside")
        case _:
            victim, trap = place / "root/var/log/app.log", place / "root/trap"
            os.mkfifo(trap)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            exchange(victim, trap)

    thread = threading.Thread(target=swap)
    thread.start()
    yield "var/log/app.log"
    stop.set()
    thread.join()


@pytest.mark.slow
def test_an_open_sees_the_file_or_nothing(place: Path, swapping: str) -> None:
    root = open_root(str(place / "root"))
    read = refused = 0
    deadline = time.monotonic() + _SECONDS
    try:
        while time.monotonic() < deadline or not (read and refused):
            try:
                descriptor, _ = open_regular_beneath(root, swapping)
            except (HostError, OSError):
                refused += 1
                continue
            with open(descriptor, "rb") as file:
                assert file.read() == b"inside"
            read += 1
    finally:
        os.close(root)


@pytest.mark.slow
def test_a_walk_reads_nothing_from_outside(place: Path, swapping: str) -> None:
    root = open_root(str(place / "root"))
    secret = {(place / "outside/app.log").stat().st_ino, (place / "outside/log/app.log").stat().st_ino}
    deadline = time.monotonic() + _SECONDS
    try:
        while time.monotonic() < deadline:
            for item in walk_beneath(root):
                assert not isinstance(item, Found) or item.status.st_ino not in secret
    finally:
        os.close(root)


@pytest.mark.slow
def test_the_directory_being_moved_out_is_not_followed_there(place: Path) -> None:
    root = open_root(str(place / "root"))
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            (place / "root/var").rename(place / "moved")
            (place / "moved").rename(place / "root/var")

    thread = threading.Thread(target=move)
    thread.start()
    seen = set()
    deadline = time.monotonic() + _SECONDS
    try:
        while time.monotonic() < deadline:
            for path in ("var/log/../log/app.log", "var/../../outside/app.log", "var/log/../../../outside/app.log"):
                try:
                    descriptor, _ = open_regular_beneath(root, path)
                except (HostError, OSError):
                    continue
                with open(descriptor, "rb") as file:
                    seen.add(file.read())
    finally:
        stop.set()
        thread.join()
        os.close(root)
    assert seen <= {b"inside"}
