"""Logs on their way to their pieces, and the jobs that make those."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece
from zonebundle.seal.plan import PlannedLog


class Job(Protocol):
    def done(self) -> bool: ...

    def result(self) -> list[Piece]: ...


@dataclass(slots=True)
class Log:
    """A log of which jobs are on their way; `jobs` give its further pieces, in order.

    `identity` is that of what was read, None if it is not certain or known already.
    """

    planned: PlannedLog
    pieces: list[Piece]
    jobs: deque[Job]
    is_read: bool = False
    identity: FileIdentity | None = None
    is_known: bool = False

    def collect(self, *, block: bool = False) -> bool:
        """Take the pieces that are ready, in order; whether that was all of them."""
        while self.jobs and (block or self.jobs[0].done()):
            self.pieces += self.jobs.popleft().result()
        return self.is_read and not self.jobs


class Pack:
    """Small logs that will be one segment; they are read when it is closed."""

    def __init__(self, begun: int) -> None:
        self.begun = begun
        self.size = 0
        self.logs: list[Log] = []
        self.future: Future[list[Piece]] | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """The job of one log in a pack."""

    pack: Pack
    index: int

    def done(self) -> bool:
        return self.pack.future is not None and self.pack.future.done()

    def result(self) -> list[Piece]:
        assert self.pack.future is not None
        return [self.pack.future.result()[self.index]]


@dataclass(frozen=True, slots=True)
class Ready:
    """A piece that needs no work."""

    piece: Piece

    def done(self) -> bool:
        return True

    def result(self) -> list[Piece]:
        return [self.piece]
