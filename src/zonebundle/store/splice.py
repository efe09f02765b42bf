"""A bundle's tar.gz by concatenation: the frame, with each log's pieces inserted at its cut.

Nothing is inflated or compressed. The bytes are the same at every download, so any range of them can be asked for.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from zonebundle.errors import DamagedError
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.failure import explain

_BLOCK = 1 << 20
"""The most bytes that are read, or handed out, at once."""
_ENOUGH = 128 << 10


def splice(bundle: StoredBundle, *, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes [start, stop) of the bundle's tar.gz, in blocks of at most 1 MiB.

    Nothing is opened before the first block is asked for; closing the iterator gives everything back. Raises
    NoSuchBundleError if the bundle was deleted since it was found, and DamagedError where a segment is missing or
    short: a stream never ends cleanly before its last byte. Blocks for disk reads only.
    """
    end = bundle.size if stop is None else min(stop, bundle.size)
    if start < 0:
        raise ValueError(f"a range cannot start at {start}")
    return _gather(bundle, start, end)


def _gather(bundle: StoredBundle, start: int, end: int) -> Iterator[bytes]:
    """Join small parts: a bundle of small files has parts of 100 bytes, and each block handed out is a system call."""
    waiting: list[bytes] = []
    size = 0
    with closing(_read(bundle, start, end)) as parts:
        for part in parts:
            if size + len(part) > _BLOCK:
                yield b"".join(waiting)
                waiting, size = [], 0
            waiting.append(part)
            size += len(part)
            if size >= _ENOUGH:
                yield b"".join(waiting)
                waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


@dataclass(frozen=True, slots=True)
class _Source:
    """A byte range of a segment, or of the frame (segment is empty), that comes `times` times in a row."""

    segment: str
    offset: int
    length: int
    times: int = 1


def _read(bundle: StoredBundle, start: int, end: int) -> Generator[bytes, None, None]:
    if start >= end:
        return
    position = 0
    with _Files(bundle) as files, closing(_sources(bundle, files.frame_size)) as sources:
        for source in sources:
            total = source.length * source.times
            if position + total > start:
                yield from files.read(source, max(start - position, 0), min(end - position, total))
            position += total
            if position >= end:
                return
    raise DamagedError(f"{bundle.directory} is shorter than its manifest says; restore it from a copy of the store")


def _sources(bundle: StoredBundle, frame_size: int) -> Generator[_Source, None, None]:
    done = 0
    for entry in bundle.entries():
        if entry.pieces:
            if entry.cut > done:
                yield _Source("", done, entry.cut - done)
                done = entry.cut
            for piece in entry.pieces:
                yield _Source(piece.segment, piece.offset, piece.packed, piece.times)
    yield _Source("", done, frame_size - done)


class _Files:
    """The descriptors of one download: the frame, and the segment that was read last."""

    def __init__(self, bundle: StoredBundle) -> None:
        self._bundle = bundle
        self._segment = -1
        self._digest = ""
        self._frame = bundle.open_frame()
        self.frame_size = os.fstat(self._frame).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._frame)
        if self._segment >= 0:
            os.close(self._segment)

    def read(self, source: _Source, low: int, high: int) -> Iterator[bytes]:
        """The bytes [low, high) of the repeated range, in parts of at most a block."""
        if source.times == 1:
            yield from self._pread(source, low, high)
            return
        # A hole of 1 GB is 1,000 times the same 1,039 bytes.
        piece = b"".join(self._pread(source, 0, source.length))
        block = piece * max(1, _BLOCK // len(piece)) if piece else b""
        while low < high:
            offset = low % len(piece)
            part = block[offset : offset + min(high - low, _BLOCK)]
            yield part
            low += len(part)

    def _pread(self, source: _Source, low: int, high: int) -> Iterator[bytes]:
        descriptor = self._open(source.segment)
        while low < high:
            try:
                part = os.pread(descriptor, min(high - low, _BLOCK), source.offset + low)
            except OSError as error:
                raise explain(f"reading {self._name(source.segment)}", error) from error
            if not part:
                raise DamagedError(f"{self._name(source.segment)} is too short; restore it from a copy of the store")
            yield part
            low += len(part)

    def _open(self, digest: str) -> int:
        if not digest:
            return self._frame
        if digest != self._digest:
            if self._segment >= 0:
                os.close(self._segment)
                self._segment, self._digest = -1, ""
            self._segment = self._bundle.segments.open(digest)
            self._digest = digest
        return self._segment

    def _name(self, digest: str) -> str:
        return f"segment {self._bundle.segments.path(digest)}" if digest else str(self._bundle.directory / "frame")
