"""The frame of a bundle: its gzip member without the log pieces.

    gzip header │ run: header of the first log │ ← pieces │ run: padding, header of the second │ ← pieces │ … │ end

Every place where pieces are inserted (a cut) lies between two runs, and the trailer tells CRC-32 and length of the
whole. So frame and pieces, put together by the cuts, are one ordinary gzip member, the same bytes at each download.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

from isal import isal_zlib

from zonebundle.model.manifest import Piece
from zonebundle.store.pieces import CHUNK, append_crc32, compress
from zonebundle.store.segment import GZIP_HEADER, gzip_end


class FrameWriter:
    """Writes a frame into `output`. `offset` is its length in bytes; errors are those of `output`."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._crc32 = 0
        self._raw = 0
        self.offset = len(GZIP_HEADER)
        output.write(GZIP_HEADER)

    def write(self, raw: bytes) -> None:
        """Append bytes of the archive that are the frame's own."""
        self._waiting.append(raw)
        self._waiting_bytes += len(raw)
        if self._waiting_bytes >= CHUNK:
            self.cut()

    def cut(self) -> int:
        """End the run that is being written, and return the offset at which pieces, or another run, may follow."""
        if self._waiting:
            raw = b"".join(self._waiting)
            data = compress(raw)
            self._output.write(data)
            self.offset += len(data)
            self._count(isal_zlib.crc32(raw), len(raw))
            self._waiting.clear()
            self._waiting_bytes = 0
        return self.offset

    def insert(self, crc32: int, size: int) -> int:
        """Cut, and count in `size` bytes with that CRC-32 that pieces bring at this place; returns the cut's offset."""
        offset = self.cut()
        self._count(crc32, size)
        return offset

    def finish(self) -> None:
        """Write the final block and the trailer."""
        self.cut()
        end = gzip_end(self._crc32, self._raw)
        self._output.write(end)
        self.offset += len(end)

    def _count(self, crc32: int, size: int) -> None:
        self._crc32 = append_crc32(self._crc32, crc32, size)
        self._raw += size


def measure(pieces: Iterable[Piece]) -> tuple[int, int, int]:
    """CRC-32, raw bytes and packed bytes of all `pieces` in a row."""
    crc32 = raw = packed = 0
    for piece in pieces:
        crc32 = append_crc32(crc32, piece.crc32, piece.raw, piece.times)
        raw += piece.raw * piece.times
        packed += piece.packed * piece.times
    return crc32, raw, packed
