"""Crash marks: which log the sealer was working on when it died, so that one log cannot keep a bundle from its seal."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef

CRASHES_TO_SKIP = 3

_SEALING = "sealing"
_CRASHES = "crashes.json"
_HEADER = 128
_SLOT = 64
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class CrashMarks:
    """`sealing` and `crashes.json` in a spool entry. Logs are told by their number in the plan, which is fixed.

    `sealing` holds who the agent is, and for each worker which logs it has in its hands; it is no more than a write of
    a few bytes a job. What is found there at the next start is counted in crashes.json, but only if the same agent
    still lives: a sealer that died with its agent, or with the machine, was not killed by a log. A pack of small logs
    counts for each of them; then they are `suspects`, which are worked on one by one and with nothing else beside,
    so that the next crash names the culprit and nobody else.

    Marks are a precaution: if they cannot be written (a full disk), the seal goes on without. A context manager;
    leaving it forgets them, as the seal has ended without a crash.
    """

    def __init__(self, entry: Path, agent: ProcessRef | None) -> None:
        self._entry = entry
        self._agent = _identity(agent)
        self._counts: Counter[int] = Counter()
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open(entry / _SEALING, _FLAGS, 0o600)
            self._count_crash()
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, self._agent, 0)

    def _count_crash(self) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            noted = json.loads((self._entry / _CRASHES).read_bytes())
            self._counts.update({int(number): int(count) for number, count in noted.items()})
        data = os.pread(self._file, 1 << 20, 0)
        if data[:_HEADER].rstrip(b"\0") != self._agent:
            return
        marked: set[int] = set()
        for at in range(_HEADER, len(data), _SLOT):
            # A slot that was never written is a hole of NULs, one that was left is blank.
            numbers = data[at : at + _SLOT].replace(b"\0", b" ").split()
            if len(numbers) == 2:
                marked.update(range(int(numbers[0]), int(numbers[1]) + 1))
        if marked:
            self._counts.update(marked)
            temporary = self._entry / f".{_CRASHES}.tmp"
            temporary.write_text(json.dumps(self._counts))
            temporary.replace(self._entry / _CRASHES)

    def skips(self, number: int) -> bool:
        """Whether the log of this number crashed the sealer too often."""
        return self._counts[number] >= CRASHES_TO_SKIP if self._counts else False

    def suspects(self, number: int) -> bool:
        """Whether the sealer died with the log of this number in its hands."""
        return number in self._counts

    def begin(self, slot: int, first: int, last: int) -> None:
        """Note that worker `slot` takes the logs `first` to `last` in its hands."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, (b"%d %d" % (first, last)).ljust(_SLOT), _HEADER + slot * _SLOT)

    def end(self, slot: int) -> None:
        """Note that worker `slot` is through with them."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, b" " * _SLOT, _HEADER + slot * _SLOT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1


def forget_marks(entry: Path) -> None:
    """The seal that made them hangs, which is no crash, and another one begins.

    The file goes, too: what that seal will write when it goes on is not to be among the marks of the other.
    """
    with contextlib.suppress(OSError):
        os.unlink(entry / _SEALING)


def were_left(entry: Path) -> bool:
    """Whether a seal of this entry was interrupted, by a crash or by its agent's end."""
    try:
        return (entry / _SEALING).stat().st_size > 0
    except OSError:
        return False


def _identity(agent: ProcessRef | None) -> bytes:
    who = f"{agent.pid} {agent.start_time}" if agent else "nobody"
    return f"{proc.boot_id()} {who}".encode("ascii")
