"""The load that the benchmarks put on a host: zones with processes and rotated JSON logs."""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SERVICES = 5
ROTATED = 39
FILES = SERVICES * (ROTATED + 1)
# A shell and four children: five processes, as a small service has. It ends at TERM at once.
COMMAND = ("sh", "-c", "trap 'kill $(jobs -p); exit 0' TERM; for i in 1 2 3 4; do sleep 1000000 & done; wait")


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
