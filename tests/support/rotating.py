"""A process that writes numbered lines to a log, and one that rotates it, as other programs do it.

Run as `rotating.py writer DIRECTORY SHARED MODE WIDTH` and `rotating.py rotator DIRECTORY SHARED MODE SECONDS`. In
SHARED, three numbers: the last line written, the last line that rotation has removed, how often it was rotated.
"""

import contextlib
import fcntl
import gzip
import mmap
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from zonebundle.host import syscalls

KEPT = 8
LOG = "app.log"
LINE = re.compile(rb"L(\d{9})[ x]*")
WRITTEN, REMOVED, ROTATED = 0, 1, 2
# Modes in which the log is truncated: the writer never reopens, and nobody writes between the copy and the cut.
COPYING = frozenset({"copytruncate", "reuse", "unknown-copy"})


class Shared:
    """The numbers, in a file mapped by all processes."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(24))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 24)
        # A native word is written at once; struct would clear it first, for others to see.
        self._words = memoryview(self._map).cast("Q")

    def get(self, place: int) -> int:
        return self._words[place]

    def set(self, place: int, number: int) -> None:
        self._words[place] = number

    def close(self) -> None:
        self._words.release()
        self._map.close()


def numbers(content: bytes) -> Iterator[int]:
    """The numbers of the whole lines in a piece of a log, which may have been cut in a line, or hold zeros."""
    for line in content.split(b"\n")[:-1]:
        if found := LINE.fullmatch(line.lstrip(b"\0")):
            yield int(found[1])


def write(directory: Path, shared: Shared, mode: str, width: int) -> None:
    log = directory / LOG
    lock = os.open(directory.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    reopen = True
    descriptor = -1

    def hang_up(*_: object) -> None:
        nonlocal reopen
        reopen = True

    signal.signal(signal.SIGHUP, hang_up)
    number = 0
    while True:
        if reopen:
            reopen = False
            if descriptor >= 0:
                os.close(descriptor)
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        number += 1
        with _locked(lock, mode):
            os.write(descriptor, b"L%09d" % number + b" " * width + b"\n")
            shared.set(WRITTEN, number)
        if number % 8 == 0:
            time.sleep(0.0005)


@contextlib.contextmanager
def _locked(lock: int, mode: str) -> Iterator[None]:
    if mode not in COPYING:
        yield
        return
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def rotate(directory: Path, shared: Shared, mode: str, seconds: float, writer: int) -> None:
    lock = os.open(directory.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    stamp = 0
    while True:
        time.sleep(seconds)
        if not (directory / LOG).exists():
            # The writer has not opened its new log yet.
            continue
        stamp += 1
        if mode in ("dated", "unknown"):
            _rename_aside(directory, shared, mode, stamp)
        else:
            _shift(directory, shared, mode)
        if mode in COPYING:
            with _locked(lock, mode):
                _copy_and_truncate(directory, mode, stamp)
        else:
            os.kill(writer, signal.SIGHUP)
        if mode == "compress":
            _compress(directory)
        shared.set(ROTATED, shared.get(ROTATED) + 1)


def _rename_aside(directory: Path, shared: Shared, mode: str, stamp: int) -> None:
    separator = "-2026010101" if mode == "dated" else "~"
    old = sorted(directory.glob(f"{LOG}{separator}*"))
    for path in old[: max(0, len(old) - KEPT + 1)]:
        _remove(path, shared)
    (directory / LOG).rename(directory / f"{LOG}{separator}{stamp:04d}")


def _shift(directory: Path, shared: Shared, mode: str) -> None:
    if mode == "unknown-copy":
        old = sorted(directory.glob("copy*"))
        for path in old[: max(0, len(old) - KEPT + 1)]:
            _remove(path, shared)
        return
    for age in range(KEPT, 0, -1):
        for suffix in ("", ".gz"):
            path = directory / f"{LOG}.{age}{suffix}"
            if not path.exists():
                continue
            if age == KEPT or (mode == "reuse" and age == 1):
                _remove(path, shared)
            else:
                path.rename(directory / f"{LOG}.{age + 1}{suffix}")
    if mode not in COPYING:
        (directory / LOG).rename(directory / f"{LOG}.1")


def _copy_and_truncate(directory: Path, mode: str, stamp: int) -> None:
    copy = directory / (f"copy{stamp:06d}" if mode == "unknown-copy" else f"{LOG}.1")
    shutil.copyfile(directory / LOG, copy)
    os.truncate(directory / LOG, 0)


def _compress(directory: Path) -> None:
    # Delayed by one rotation, as with logrotate's delaycompress: the writer may still have the youngest open.
    path = directory / f"{LOG}.2"
    if path.exists():
        with path.open("rb") as source, gzip.open(f"{path}.gz", "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target)
        path.unlink()


def _remove(path: Path, shared: Shared) -> None:
    content = path.read_bytes()
    last = max(numbers(gzip.decompress(content) if path.suffix == ".gz" else content), default=0)
    shared.set(REMOVED, max(last, shared.get(REMOVED)))
    path.unlink()


def main() -> None:
    # A killed test run must not leave a writer that fills the disk.
    syscalls.die_with_parent(os.getppid(), signal.SIGKILL)
    role, directory, shared, mode, number = sys.argv[1:6]
    if role == "writer":
        write(Path(directory), Shared(Path(shared)), mode, int(number))
    else:
        rotate(Path(directory), Shared(Path(shared)), mode, float(number), int(sys.argv[6]))


if __name__ == "__main__":
    main()
