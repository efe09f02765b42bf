"""The load that the benchmarks put on a host: zones with processes and rotated JSON logs."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from zonebundle.host import syscalls
from zonebundle.store.pieces import CHUNK

SERVICES = 5
ROTATED = 39
FILES = SERVICES * (ROTATED + 1)
# A shell and four children: five processes, as a small service has. It ends at TERM at once.
COMMAND = ("sh", "-c", "trap 'kill $(jobs -p); exit 0' TERM; for i in 1 2 3 4; do sleep 1000000 & done; wait")

# For an agent of which not the hold is measured: none is cut short, and nothing is sealed but what is asked for.
SETTINGS = '[hold]\nbudget = "60s"\n[seal]\nahead = "0s"\n'


def json_lines(seed: int, size: int) -> bytes:
    """About `size` bytes of log lines as services write them: JSON, with words that repeat and numbers that do not."""
    chance = random.Random(seed)
    lines = []
    total = 0
    while total < size:
        minute, second, micro = chance.randrange(60), chance.randrange(60), chance.randrange(10**6)
        line = json.dumps(
            {
                "time": f"2026-01-02T03:{minute:02}:{second:02}.{micro:06}Z",
                "level": chance.choice(["info", "info", "info", "warn", "error"]),
                "msg": chance.choice(["request completed", "connection accepted", "cache miss", "retrying"]),
                "req_id": f"{chance.getrandbits(64):016x}",
                "latency_us": chance.randrange(10**6),
                "component": chance.choice(["dropshot", "nexus", "propolis", "crucible"]),
            }
        )
        lines.append(line)
        total += len(line) + 1
    return ("\n".join(lines) + "\n").encode()[:size]


def write_logs(directory: Path, total: int) -> None:
    """FILES log files of equal size, `total` bytes in all; clean (written out) and in the page cache."""
    directory.mkdir(parents=True, exist_ok=True)
    size = total // FILES
    block = json_lines(0, min(size, 4 << 20) or 1)
    for service in range(SERVICES):
        for age in range(ROTATED + 1):
            name = f"service-{service}.log" + (f".{age}" if age else "")
            with (directory / name).open("wb") as file:
                # Different bytes in every file: equal ones would be stored once.
                file.write(f"{directory.name} {name}\n".encode())
                left = size - file.tell()
                while left > 0:
                    file.write(block[: min(left, len(block))])
                    left -= len(block)
    os.sync()


@functools.cache
def _blocks() -> list[bytes]:
    return [json_lines(seed, CHUNK) for seed in range(16)]


def chunk(number: int) -> bytes:
    """CHUNK bytes of log lines, different for each number. The same lines are farther apart than a compressor sees."""
    block = _blocks()[number % len(_blocks())]
    at = block.index(b"\n", number * 7919 % (CHUNK // 2)) + 1
    return (b'{"chunk":%d}\n' % number + block[at:] + block[:at])[:CHUNK]


def write_chunks(directory: Path, count: int, size: int) -> None:
    """`count` rotated logs of `size` bytes, none with a chunk of another; clean and in the page cache."""
    directory.mkdir(parents=True, exist_ok=True)
    each = -(-size // CHUNK)
    for number in range(count):
        with (directory / f"service.log.{number + 1}").open("wb") as file:
            for position in range(each):
                file.write(chunk(number * each + position)[: size - position * CHUNK])
    os.sync()


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """A directory that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="zb-bench-") as work:
        yield Path(work)


@contextlib.contextmanager
def without_sync() -> Iterator[None]:
    """Nothing that this process writes is made durable: to make a store quickly, or to see what that costs."""
    with (
        mock.patch.object(os, "fsync", lambda descriptor: None),
        mock.patch.object(os, "fdatasync", lambda descriptor: None),
        mock.patch.object(syscalls, "syncfs", lambda descriptor: None),
    ):
        yield


def file_sizes(directory: Path) -> dict[Path, int]:
    """The size in bytes of every file below."""
    return {
        Path(top, name): os.lstat(os.path.join(top, name)).st_size
        for top, _, names in os.walk(directory)
        for name in names
    }


def one_lock_gzip(files: list[Path]) -> float:
    """Seconds to bundle files as Omicron does: one thread, tar with gzip's best level."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=9) as archive:
        for path in files:
            archive.add(path, path.name)
    return time.monotonic() - begin


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: what, the target, what was reached."""

    what: str
    target: str
    reached: str
    holds: bool | None = None


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1000


def print_rows(rows: Iterator[Row] | list[Row]) -> None:
    """Print the rows as they come, as a table for a note."""
    print(f"| {'what':74} | {'target':>16} | {'reached':42} | ok  |")
    print(f"|{'-' * 76}|{'-' * 18}|{'-' * 44}|-----|")
    for row in rows:
        mark = {True: "yes", False: "NO", None: "-"}[row.holds]
        print(f"| {row.what:74} | {row.target:>16} | {row.reached:42} | {mark:3} |", flush=True)
