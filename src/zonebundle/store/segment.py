"""A segment: an ordinary .gz file of one or many runs, named by the BLAKE3 of its bytes.

    gzip header (10 bytes, RFC 1952, mtime 0) │ run │ run │ … │ final empty block 03 00 │ crc32, length (8 bytes)

A piece is the place of one run in it. `zcat` of a segment prints the raw bytes of all its pieces in a row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from blake3 import blake3

from zonebundle.model.manifest import Piece
from zonebundle.store.pieces import Run, append_crc32

# Magic, method deflate, no flags, no mtime, no extra flags, operating system unknown: the same bytes on every host.
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_FINAL_BLOCK = b"\x03\x00"
_TRAILER = struct.Struct("<II")


def gzip_end(crc32: int, length: int) -> bytes:
    """What ends a gzip member after its last run; `length` is bytes, of which the format keeps 32 bits."""
    return _FINAL_BLOCK + _TRAILER.pack(crc32, length & 0xFFFFFFFF)


def build_segment(runs: Sequence[Run]) -> tuple[str, bytes, list[Piece]]:
    """The digest, the file bytes and one piece a run of the segment that holds `runs`, of which there is at least one.

    The digest depends on the runs alone: the same content, cut alike, is the same segment.
    """
    if not runs:
        raise ValueError("a segment holds at least one run")
    places = []
    offset = len(GZIP_HEADER)
    crc32 = length = 0
    for run in runs:
        places.append(offset)
        offset += len(run.data)
        crc32 = append_crc32(crc32, run.crc32, run.raw)
        length += run.raw
    data = b"".join((GZIP_HEADER, *(run.data for run in runs), gzip_end(crc32, length)))
    digest = blake3(data).hexdigest()
    pieces = [
        Piece(digest, place, len(run.data), run.raw, run.crc32, run.blake3)
        for place, run in zip(places, runs, strict=True)
    ]
    return digest, data, pieces
