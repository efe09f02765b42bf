"""One bundle looked at by itself: the manifest line by line, and the frame against it.

The two prove each other. The frame holds the tar headers of the manifest's entries and ends with a copy of the
manifest; its trailer has the CRC-32 and the length of the whole archive, those of the log pieces included. Where they
disagree, the frame is read once more by its own copy of the manifest: if that agrees, it is the manifest's file that is
damaged, else the frame. Both are streamed, in bounded memory.

What no check of content finds: some 2 % of the single bits of a frame can be turned without changing what it inflates
to (a match in a row of zeros may begin anywhere in it). Such a bundle still unpacks to the same bytes.
"""

from __future__ import annotations

import errno
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from isal import isal_zlib

from zonebundle.errors import DamagedError, FormatError
from zonebundle.model.manifest import Entry, Header, Piece, decode_line
from zonebundle.model.paths import printable
from zonebundle.store.bundle import FRAME, MANIFEST
from zonebundle.store.frame import measure
from zonebundle.store.pieces import append_crc32
from zonebundle.store.segment import GZIP_HEADER, gzip_end
from zonebundle.store.tar import BLOCK, END_OF_ARCHIVE, entry_header, padding

FLUSH_END = b"\x00\x00\xff\xff"
"""The last bytes of every run: those of the empty stored block that a full flush writes."""
NEXT_RAW = b"next run"
NEXT_RUN = b"\x01%c\x00%c\xff%b" % (len(NEXT_RAW), 255 - len(NEXT_RAW), NEXT_RAW)
"""A final stored block, which inflates to NEXT_RAW only where a run may begin: at the end of a block, and of a byte."""
END_SIZE = len(gzip_end(0, 0))

_READ = 1 << 20
_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = MANIFEST.encode("ascii")

Blocks = Callable[[], Iterable[bytes]]
"""The bytes of a manifest, from their beginning at each call."""


class FrameDamagedError(DamagedError):
    """The frame is damaged, as opposed to the manifest; private to the check."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one file of a bundle; `name` is MANIFEST or FRAME."""

    name: str
    what: str


def find_faults(
    directory: Path, zone: str, bundle_id: str, *, manifest: str = MANIFEST, on_entry: Callable[[Entry], None]
) -> Iterator[Fault]:
    """Check the bundle in `directory`, which is to be that of this zone and ID, in the files `manifest` and `frame`.

    `on_entry` is told every entry up to the first that is damaged. Raises FileNotFoundError if there is no manifest.
    """
    path = directory / manifest
    try:
        frame = os.open(directory / FRAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        # The manifest goes first when a bundle is deleted.
        path.stat()
        yield Fault(FRAME, "is missing" if error.errno == errno.ENOENT else unreadable(error))
        return
    try:
        try:
            _compare(lambda: _file_blocks(path), path.stat().st_size, frame, (zone, bundle_id), on_entry)
            return
        except (DamagedError, FormatError) as error:
            # Not the exception: in its traceback is what the comparison has open.
            what, is_newer, is_frame = str(error), isinstance(error, FormatError), isinstance(error, FrameDamagedError)
        frame_what = _check_alone(frame, (zone, bundle_id))
    finally:
        os.close(frame)
    # Where both are of a newer format, nothing is known of the frame.
    if frame_what and not (is_newer and frame_what == what):
        yield Fault(FRAME, frame_what)
    if not is_frame:
        yield Fault(MANIFEST, what)
    elif not frame_what:
        yield Fault(MANIFEST, "is not the same as its copy in the frame")


def unreadable(error: OSError) -> str:
    """What a file is that the system cannot read."""
    return f"cannot be read: {os.strerror(error.errno or 0).lower()}"


def _check_alone(frame: int, identity: tuple[str, str]) -> str:
    """What is wrong with a frame by its own copy of the manifest; empty if nothing is."""
    try:
        offset, size = _find_copy(frame)
        _compare(lambda: _copy_blocks(frame, offset, size), size, frame, identity, lambda _: None)
    except (DamagedError, FormatError) as error:
        return str(error)
    return ""


def _compare(
    manifest: Blocks, size: int, frame: int, identity: tuple[str, str], on_entry: Callable[[Entry], None]
) -> None:
    """Raise DamagedError for the first thing that is wrong: its subclass if the frame differs from the manifest."""
    lines = _lines(manifest())
    header = _parse_header(next(lines, b""))
    if (header.metadata.zone, header.metadata.bundle_id) != identity:
        raise DamagedError("is that of another bundle")
    content = _FrameCheck(frame)
    # As in the draft: 64 bits a path, of which a million are too many to keep.
    paths = {hash(_NAME)}
    packed = raw = 0
    for number, line in enumerate(lines, start=2):
        entry, entry_packed, tar_header = _parse_entry(line, number)
        if hash(entry.path) in paths:
            raise DamagedError(f"line {number}: {printable(entry.path)} is there twice")
        paths.add(hash(entry.path))
        on_entry(entry)
        content.add(entry, tar_header)
        packed += entry_packed
        raw += entry.size
    if (packed, raw) != (header.packed, header.raw):
        raise DamagedError("does not have the entries that its first line counts")
    content.finish(manifest, size)


def _parse_header(line: bytes) -> Header:
    try:
        header = Header.from_json(decode_line(line))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError("line 1 is no header") from None
    if not all(_is_count(number) for number in (header.gaps, header.packed, header.raw)):
        raise DamagedError("line 1 is no header")
    return header


def _parse_entry(line: bytes, number: int) -> tuple[Entry, int, bytes]:
    """The entry, the packed bytes of its pieces, and its tar header."""
    try:
        entry = Entry.from_json(decode_line(line))
        numbers = (entry.size, entry.crc32, entry.mode, entry.cut)
        if not line.endswith(b"\n") or not all(map(_is_count, numbers)) or type(entry.mtime_ns) is not int:
            raise ValueError
        if any(part in (b"", b".", b"..") for part in entry.path.split(b"/")) or b"\0" in entry.path:
            raise DamagedError(f"line {number}: {printable(entry.path)!r} leads out of the archive")
        if not all(map(_is_piece, entry.pieces)):
            raise ValueError
        header = entry_header(entry.path, entry.size, entry.mode, entry.mtime_ns)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise DamagedError(f"line {number} is no entry") from None
    crc32, raw, packed = measure(entry.pieces)
    if entry.pieces and (crc32, raw) != (entry.crc32, entry.size):
        raise DamagedError(f"line {number}: the pieces of {printable(entry.path)} are not those of a file like it")
    return entry, packed, header


def _is_piece(piece: Piece) -> bool:
    return (
        all(map(_is_count, (piece.offset, piece.packed, piece.raw, piece.crc32, piece.times)))
        and piece.times > 0
        and piece.crc32 < 1 << 32
        and _HEX.fullmatch(piece.segment) is not None
        and _HEX.fullmatch(piece.blake3) is not None
    )


def _is_count(number: object) -> bool:
    # Not isinstance: True is an int too.
    return type(number) is int and number >= 0


class _FrameCheck:
    """Holds a frame against entries that come one by one; raises FrameDamagedError.

    The frame is read from cut to cut. What has to be in between is known by then, as a digest: the rest of an own
    entry, whose CRC-32 its line has, then padding and headers of the entries after it.
    """

    def __init__(self, frame: int) -> None:
        self._frame = frame
        self._end = _end_of(frame)
        self._at = len(GZIP_HEADER)
        self._own: Entry | None = None
        self._expected = blake3()
        self._expected_size = 0
        self._padding = b""
        self._crc32 = 0
        self._raw = 0
        if _pread(frame, len(GZIP_HEADER), 0) != GZIP_HEADER:
            raise FrameDamagedError("does not begin as a gzip file of ours")

    def add(self, entry: Entry, header: bytes) -> None:
        """The next entry, and its tar header."""
        self._expect(self._padding + header)
        self._padding = padding(entry.size)
        if not entry.size:
            return
        if not self._at < entry.cut <= self._end:
            raise FrameDamagedError(f"has no place at {entry.cut} for {printable(entry.path)}")
        run = self._begin_run(entry.cut)
        run.end()
        self._count(run)
        if entry.pieces:
            self._crc32 = append_crc32(self._crc32, entry.crc32, entry.size)
            self._raw += entry.size
        else:
            self._own = entry

    def finish(self, manifest: Blocks, size: int) -> None:
        """The archive's last entry, which is the manifest itself, and the end of the gzip member."""
        self._expect(self._padding)
        run = self._begin_run(self._end)
        header = run.read_bytes(BLOCK)
        try:
            mtime = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").mtime
            is_header = header == entry_header(_NAME, size, 0o600, int(mtime) * 1_000_000_000)
        except (tarfile.HeaderError, ValueError):
            is_header = False
        digest = blake3()
        for block in manifest():
            digest.update(block)
        if not is_header or run.digest(size) != digest.digest():
            raise FrameDamagedError("has another copy of the manifest than the manifest's file")
        if run.read_bytes(len(padding(size)) + len(END_OF_ARCHIVE)) != padding(size) + END_OF_ARCHIVE:
            raise FrameDamagedError("has no proper end of the archive")
        run.end()
        self._count(run)
        if _pread(self._frame, END_SIZE + 1, self._end) != gzip_end(self._crc32, self._raw):
            raise FrameDamagedError("does not have the CRC-32 and length that its trailer tells")

    def _expect(self, data: bytes) -> None:
        self._expected.update(data)
        self._expected_size += len(data)

    def _begin_run(self, end: int) -> _Inflated:
        """Read on to `end`, through all that is known to be there."""
        run = _Inflated(self._frame, self._at, end)
        if self._own is not None and run.crc32_of(self._own.size) != self._own.crc32:
            raise FrameDamagedError(f"does not have the bytes of {printable(self._own.path)}")
        if run.digest(self._expected_size) != self._expected.digest():
            raise FrameDamagedError(f"has other tar headers before {end} than the manifest's entries")
        self._own = None
        self._expected = blake3()
        self._expected_size = 0
        self._at = end
        return run

    def _count(self, run: _Inflated) -> None:
        self._crc32 = append_crc32(self._crc32, run.crc32, run.raw)
        self._raw += run.raw


class _Inflated:
    """What the bytes [start, end) of a frame inflate to, by themselves; raises FrameDamagedError."""

    def __init__(self, frame: int, start: int, end: int) -> None:
        self._frame = frame
        self._at = start
        self._end = end
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._input = b""
        self.crc32 = 0
        self.raw = 0

    def read(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, in blocks."""
        while size:
            block = self._inflate(min(size, _READ))
            if not block:
                raise FrameDamagedError(f"ends too early before {self._end}")
            size -= len(block)
            yield block

    def read_bytes(self, size: int) -> bytes:
        """The next `size` bytes, in one."""
        return b"".join(self.read(size))

    def digest(self, size: int) -> bytes:
        """The BLAKE3 of the next `size` bytes."""
        digest = blake3()
        for block in self.read(size):
            digest.update(block)
        return digest.digest()

    def crc32_of(self, size: int) -> int:
        """The CRC-32 of the next `size` bytes."""
        crc32 = 0
        for block in self.read(size):
            crc32 = isal_zlib.crc32(block, crc32)
        return crc32

    def rest(self) -> Iterator[bytes]:
        """Everything that is left."""
        while block := self._inflate(_READ):
            yield block

    def end(self) -> None:
        """Nothing may be left, and the last run has to end as one that another can follow."""
        if self._inflate(1) or _pread(self._frame, len(FLUSH_END), self._end - len(FLUSH_END)) != FLUSH_END:
            raise FrameDamagedError(f"has more than the manifest's entries before {self._end}")
        # A bit of the last block's header may be wrong, which only shows in what follows.
        try:
            is_followed = self._inflater.decompress(NEXT_RUN) == NEXT_RAW and self._inflater.eof
        except zlib.error:
            is_followed = False
        if not is_followed:
            raise FrameDamagedError(f"does not end a run at {self._end}")

    def _inflate(self, limit: int) -> bytes:
        try:
            while not self._inflater.eof:
                block = self._inflater.decompress(self._input, limit)
                self._input = self._inflater.unconsumed_tail
                if block:
                    self.crc32 = isal_zlib.crc32(block, self.crc32)
                    self.raw += len(block)
                    return block
                if not self._input:
                    self._input = _pread(self._frame, min(_READ, self._end - self._at), self._at)
                    self._at += len(self._input)
                    if not self._input:
                        return b""
        except zlib.error as error:
            raise FrameDamagedError(f"does not inflate before {self._end} ({error})") from None
        raise FrameDamagedError(f"has a final block before {self._end}")


def _end_of(frame: int) -> int:
    """Where the last run of a frame ends."""
    end = os.fstat(frame).st_size - END_SIZE
    if end < len(GZIP_HEADER):
        raise FrameDamagedError("is too short to be one")
    return end


def _find_copy(frame: int) -> tuple[int, int]:
    """Offset (in what the frame inflates to) and size of the frame's copy of the manifest."""
    content = _Inflated(frame, len(GZIP_HEADER), _end_of(frame))
    header = kept = b""
    offset = position = 0
    for block in content.rest():
        data = kept + block
        # The last one is it: a manifest has no null bytes.
        found = data.rfind(_NAME + b"\0", 0, max(0, len(data) - BLOCK + len(_NAME) + 1))
        if found >= 0:
            header = data[found : found + BLOCK]
            offset = position - len(kept) + found + BLOCK
        position += len(block)
        kept = data[-BLOCK + 1 :]
    try:
        size = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except (tarfile.HeaderError, ValueError):
        raise FrameDamagedError("has no copy of the manifest") from None
    return offset, size


def _copy_blocks(frame: int, offset: int, size: int) -> Iterator[bytes]:
    content = _Inflated(frame, len(GZIP_HEADER), _end_of(frame))
    for _ in content.read(offset):
        pass
    yield from content.read(size)


def _file_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        try:
            while block := file.read(_READ):
                yield block
        except OSError as error:
            raise DamagedError(unreadable(error)) from error


def _pread(frame: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(frame, size, offset)
    except OSError as error:
        raise FrameDamagedError(unreadable(error)) from error


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    for block in blocks:
        *lines, last = block.split(b"\n")
        for line in lines:
            yield b"".join((*waiting, line, b"\n"))
            waiting.clear()
        waiting.append(last)
    if rest := b"".join(waiting):
        yield rest
