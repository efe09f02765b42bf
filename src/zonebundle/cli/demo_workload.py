"""What runs in a zone of the demo: a service with worker processes that write JSON logs and rotate them by rename.

A program of its own, on the standard library alone: `python -I -S demo_workload.py --service web-01 …` in the zone's
root. Each worker first writes the log of a few hours, as fast as it can, then goes on at an everyday pace until
SIGTERM, at which it writes a last line. The file `ready` appears in the root when all have come to the everyday pace.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import time
from pathlib import Path

# Seconds between two writes, and lines in each, at the everyday pace.
_PAUSE = 0.25
_LINES = 4
# Lines of the past: seconds between two, and how many are written at a time.
_STEP = 0.35
_BATCH = 100

_WORDS = {
    "web": ("GET", "POST", "PUT", "HEAD"),
    "api": ("list", "create", "update", "watch"),
    "db": ("SELECT", "INSERT", "UPDATE", "COMMIT"),
    "cache": ("hit", "miss", "store", "evict"),
    "queue": ("publish", "deliver", "ack", "requeue"),
    "mail": ("accept", "queue", "send", "bounce"),
    "auth": ("login", "refresh", "verify", "deny"),
}
_TARGETS = ("orders", "users", "sessions", "invoices", "images", "reports", "baskets", "prices")


class _Log:
    """A log file that is renamed to .1 when it is full, and what was .1 to .2, and so on."""

    def __init__(self, path: str, full: int, keep: int) -> None:
        self._path = path
        self._full = full
        self._keep = keep
        self.rotations = 0
        self._open()

    def _open(self) -> None:
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self.size = self._file.tell()

    def write(self, lines: bytes) -> None:
        self._file.write(lines)
        self.size += len(lines)
        if self.size >= self._full:
            self._rotate()

    def _rotate(self) -> None:
        self._file.close()
        for age in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self._path}.{age}", f"{self._path}.{age + 1}")
        os.rename(self._path, f"{self._path}.1")
        self.rotations += 1
        self._open()


def _make_lines(service: str, worker: int, count: int, start: float, step: float, chance: random.Random) -> bytes:
    words = _WORDS.get(service.rpartition("-")[0], _WORDS["web"])
    lines = []
    second, stamp = 0, ""
    for number in range(count):
        moment = start + number * step
        bits = chance.getrandbits(64)
        level = "warn" if bits & 31 == 0 else "info"
        if int(moment) != second:
            second = int(moment)
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        lines.append(
            f'{{"time":"{stamp}.{int(moment * 1000) % 1000:03d}Z","level":"{level}","service":"{service}",'
            f'"worker":{worker},"operation":"{words[(bits >> 5) & 3]}","target":"/{_TARGETS[(bits >> 7) & 7]}/'
            f'{(bits >> 10) & 0xFFFF}","request":"{bits >> 24:010x}","client":"10.0.{(bits >> 26) & 15}.'
            f'{(bits >> 30) & 255}","milliseconds":{((bits >> 38) & 0x3FFF) / 100},"bytes":{(bits >> 52) & 0xFFF}}}\n'
        )
    return "".join(lines).encode()


def _work(options: argparse.Namespace, worker: int, ready: int) -> None:
    chance = random.Random(f"{options.service} {worker}")
    log = _Log(f"logs/{options.logs[worker]}.log", options.file_bytes, options.files - 1)
    # The current file is left partly filled, differently in each worker.
    last_size = int(options.file_bytes * (0.2 + 0.6 * chance.random()))
    line_bytes = len(_make_lines(options.service, worker, _BATCH, 0, _STEP, chance)) / _BATCH
    lines = (options.file_bytes * (options.files - 1) + last_size) / line_bytes
    # A file is rotated up to a batch late, in which case more lines are written: none of them in the future.
    moment = time.time() - (lines + 2 * options.files * _BATCH) * _STEP
    while log.rotations < options.files - 1 or (log.size < last_size and log.rotations < options.files):
        if _is_asked_to_end():
            break
        log.write(_make_lines(options.service, worker, _BATCH, moment, _STEP, chance))
        moment += _BATCH * _STEP
    os.close(ready)
    while signal.sigtimedwait({signal.SIGTERM}, _PAUSE) is None:
        log.write(_make_lines(options.service, worker, _LINES, time.time(), _PAUSE / _LINES, chance))
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    log.write(f'{{"time":"{stamp}","level":"info","service":"{options.service}","last":"words"}}\n'.encode())


def _is_asked_to_end() -> bool:
    return signal.SIGTERM in signal.sigpending()


def main() -> None:
    """Start the workers, say when they are ready, and end when they have ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--service", required=True)
    parser.add_argument("--files", type=int, required=True, help="log files a worker keeps, the current one included")
    parser.add_argument("--file-bytes", type=int, required=True, help="size at which a log file is rotated")
    parser.add_argument("logs", nargs="+", help="a worker for each, writing logs/NAME.log")
    options = parser.parse_args()
    os.makedirs("logs", exist_ok=True)
    # Blocked, SIGTERM is never lost between two lines: the workers ask for it when it suits them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    waiting, ready = os.pipe()
    workers = []
    for worker in range(len(options.logs)):
        process = os.fork()
        if process == 0:
            os.close(waiting)
            _work(options, worker, ready)
            os._exit(0)
        workers.append(process)
    os.close(ready)
    # Readable, at its end, when the last worker has closed its own.
    while not select.select([waiting], [], [], _PAUSE)[0] and not _is_asked_to_end():
        pass
    if not _is_asked_to_end():
        print(f"{options.service}: {len(options.logs)} workers, process {os.getpid()}", flush=True)
        Path("ready").touch()
    # Asked to end, or a worker has ended: a service is whole or it is not there.
    signal.sigwait({signal.SIGTERM, signal.SIGCHLD})
    for process in workers:
        os.kill(process, signal.SIGTERM)
    for process in workers:
        os.waitpid(process, 0)
    print(f"{options.service}: ended", flush=True)


if __name__ == "__main__":
    main()
