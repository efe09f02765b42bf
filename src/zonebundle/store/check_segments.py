"""The segments of a store looked at one by one, and remembered in few bytes each.

Of a million segments a set of names would take 150 MB. Their digests are as good as random, so 64 bits tell them
apart, and an array of those, sorted, takes 8.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self

from blake3 import blake3
from isal import igzip_lib, isal_zlib

from zonebundle.host.files import describe_kind
from zonebundle.model.manifest import Piece
from zonebundle.store.check_bundle import END_SIZE, FLUSH_END, NEXT_RAW, NEXT_RUN, unreadable
from zonebundle.store.failure import store_errors
from zonebundle.store.segment import GZIP_HEADER
from zonebundle.store.segments import Segments

_READ = 1 << 20
_NAME = re.compile(r"([0-9a-f]{64})\.gz")
_FIRST = re.compile(r"[0-9a-f]{2}")
# The writer's own places: what is in them is on its way.
_PRUNED = "pruned"
_WORKING = ("tmp", _PRUNED)
_RAW_DEFLATE = -15
_FINAL_BLOCK = b"\x03\x00"
# Pieces that are remembered as good, so that those of many bundles are looked at once: some 40 MB.
_MOST_REMEMBERED = 1 << 19


class Place(Enum):
    """What came of looking for a piece in its segment."""

    GOOD = "good"
    MISSING = "missing"
    DAMAGED = "damaged"
    OTHER = "other"
    """The segment is whole, and the piece is not in it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A file in the segments' directory; `what` says what is wrong with it, `digest` is empty if it is no segment."""

    path: str
    digest: str
    what: str


class SegmentTable:
    """The segments that a store has, and what is known of each."""

    _USED = 1
    _DAMAGED = 2

    def __init__(self, segments: Segments, root: str) -> None:
        self._segments = segments
        self._root = root
        self._keys = array("Q")
        self._sizes = array("Q")
        self._marks = bytearray()

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, on_read: Callable[[], None]) -> Iterator[Seen]:
        """Read every segment there is; yields those that are damaged, and what is no segment. Raises StoreError.

        `on_read` is called after each.
        """
        for directory, names in self._listing():
            for name in names:
                path = f"{directory}/{name}" if name else directory
                match = _NAME.fullmatch(name)
                if not match or match[1][:2] != os.path.basename(directory):
                    yield Seen(path, "", "is no segment")
                    continue
                found = examine(path, match[1])
                # Removed since the directory was listed.
                if found is None:
                    continue
                size, what = found
                # Directories and names come sorted, so the keys do too.
                self._keys.append(_key(match[1]))
                self._sizes.append(size)
                self._marks.append(self._DAMAGED if what else 0)
                on_read()
                if what:
                    yield Seen(path, match[1], what)

    def mark_used(self, digest: str) -> None:
        """Note that a bundle uses the segment, if it is known."""
        index = self._find(digest)
        if index >= 0:
            self._marks[index] |= self._USED

    def use(self, digest: str) -> tuple[Place, int]:
        """Note that a bundle uses the segment; whether it is whole, and its size in bytes."""
        index = self._find(digest)
        if index < 0:
            # Made since the directory was listed, or moved there and back by a clean-up of the agent's.
            found = examine(self._segments.path(digest), digest)
            if found is None:
                return Place.MISSING, 0
            return (Place.DAMAGED if found[1] else Place.GOOD), found[0]
        self._marks[index] |= self._USED
        return (Place.DAMAGED if self._marks[index] & self._DAMAGED else Place.GOOD), self._sizes[index]

    def is_set_aside(self, digest: str) -> bool:
        """Whether a clean-up has taken the segment away, from where it puts back what a bundle uses."""
        return os.path.exists(f"{self._root}/{_PRUNED}/{digest}.gz")

    def replaced(self, digest: str, size: int) -> None:
        """Note that a damaged segment is whole now."""
        index = self._find(digest)
        if index >= 0:
            self._marks[index] &= ~self._DAMAGED
            self._sizes[index] = size

    def unused(self) -> Iterator[str]:
        """The path of every whole segment that no bundle uses and that is still there."""
        for directory, names in self._listing():
            for name in names:
                match = _NAME.fullmatch(name)
                index = self._find(match[1]) if match else -1
                if index >= 0 and not self._marks[index]:
                    yield f"{directory}/{name}"

    def _find(self, digest: str) -> int:
        key = _key(digest)
        index = bisect_left(self._keys, key)
        return index if index < len(self._keys) and self._keys[index] == key else -1

    def _listing(self) -> Iterator[tuple[str, list[str]]]:
        for first in _names(self._root):
            if first in _WORKING:
                continue
            directory = f"{self._root}/{first}"
            if _FIRST.fullmatch(first) and os.path.isdir(directory) and not os.path.islink(directory):
                yield directory, _names(directory)
            else:
                yield directory, [""]


def _names(directory: str) -> list[str]:
    with store_errors(f"listing {directory}"):
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []


def _key(digest: str) -> int:
    return int(digest[:16], 16)


def examine(path: str, digest: str) -> tuple[int, str] | None:
    """Read a segment: its size in bytes and what is wrong with it, which is empty if nothing is; None if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        return 0, "is a symbolic link" if error.errno == errno.ELOOP else unreadable(error)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return 0, f"is a {describe_kind(status.st_mode)}"
        actual = blake3()
        while block := os.read(descriptor, _READ):
            actual.update(block)
        if actual.hexdigest() != digest:
            return status.st_size, "does not have the bytes that its name says"
        return status.st_size, "" if _is_member(descriptor, status.st_size) else "is no gzip file of runs"
    except OSError as error:
        return 0, unreadable(error)
    finally:
        os.close(descriptor)


def _is_member(descriptor: int, size: int) -> bool:
    end = FLUSH_END + _FINAL_BLOCK
    return (
        size >= len(GZIP_HEADER) + len(FLUSH_END) + END_SIZE
        and os.pread(descriptor, len(GZIP_HEADER), 0) == GZIP_HEADER
        and os.pread(descriptor, len(end), size - END_SIZE - len(FLUSH_END)) == end
    )


class PieceCheck:
    """Looks for pieces in their segments; `deep` inflates each. One thread at a time; closed by its `with` block."""

    def __init__(self, segments: Segments, table: SegmentTable, *, deep: bool) -> None:
        self._segments = segments
        self._table = table
        self._deep = deep
        self._good: set[int] = set()
        # The segment looked at last: a pack has hundreds of pieces in a row.
        self._digest = ""
        self._place = Place.MISSING
        self._size = 0
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.forget()

    def look(self, piece: Piece) -> Place:
        """Whether the piece is where it says. Raises StoreError."""
        if piece.segment != self._digest:
            self._turn_to(piece.segment)
        if self._place is not Place.GOOD:
            return self._place
        # With all fields: another bundle may tell other things of the same bytes.
        key = hash(piece)
        if key in self._good:
            return Place.GOOD
        place = self._compare(piece)
        if place is Place.GOOD:
            if len(self._good) >= _MOST_REMEMBERED:
                self._good.clear()
            self._good.add(key)
        return place

    def forget(self) -> None:
        """Look anew at the next piece's segment."""
        self._digest = ""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _turn_to(self, digest: str) -> None:
        self.forget()
        self._place, self._size = self._table.use(digest)
        self._digest = digest

    def _compare(self, piece: Piece) -> Place:
        end = piece.offset + piece.packed
        if not len(GZIP_HEADER) <= piece.offset < end <= self._size - END_SIZE or piece.packed < len(FLUSH_END):
            return Place.OTHER
        try:
            if self._descriptor < 0:
                path = self._segments.path(piece.segment)
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.pread(self._descriptor, len(FLUSH_END), end - len(FLUSH_END)) != FLUSH_END:
                return Place.OTHER
            if self._deep and not _inflates(os.pread(self._descriptor, piece.packed, piece.offset), piece):
                return Place.OTHER
        except FileNotFoundError:
            return Place.MISSING
        except OSError:
            return Place.DAMAGED
        return Place.GOOD


def _inflates(data: bytes, piece: Piece) -> bool:
    inflater = isal_zlib.decompressobj(_RAW_DEFLATE)
    try:
        raw = inflater.decompress(data + NEXT_RUN, piece.raw + len(NEXT_RAW) + 1)
    except igzip_lib.IsalError:  # type: ignore[misc]  # the stub takes it for an instance
        return False
    if len(raw) != piece.raw + len(NEXT_RAW) or not raw.endswith(NEXT_RAW) or not inflater.eof:
        return False
    content = memoryview(raw)[: piece.raw]
    return isal_zlib.crc32(content) == piece.crc32 and blake3(content).hexdigest() == piece.blake3
