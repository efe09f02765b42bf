"""Deflating log content: every run can be spliced into a gzip member by itself, and is compressed once.

A run is a byte-aligned sequence of deflate blocks (RFC 1951) of which none is the final one and none refers to bytes
before the run: it ends with a full flush, whose last bytes are those of an empty stored block, `00 00 ff ff`. Runs in a
row, then the final empty block `03 00`, are one deflate stream.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from blake3 import blake3
from isal import isal_zlib

CHUNK = 1 << 20
"""Bytes of a chunk: a large log is cut into chunks, a piece each."""
SMALL = 256 << 10
"""Below this size in bytes a log is packed with others into one segment."""

# Level 1 is the fastest that finds repetitions: 1.2 GB/s of JSON lines on one core, zlib's level 6 does 95 MB/s.
_LEVEL = 1
_RAW_DEFLATE = -15

# gzip (RFC 1952), zstd and its skippable frames (RFC 8878), xz, bzip2, lz4 frames: their first bytes.
_MAGICS = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"\x04\x22\x4d\x18")
_SKIPPABLE_FRAME = b"\x2a\x4d\x18"
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")


@dataclass(frozen=True, slots=True)
class Run:
    """A deflated run: its bytes, and the length, CRC-32 and BLAKE3 (hex) of the raw bytes."""

    data: bytes
    raw: int
    crc32: int
    blake3: str


def content_digest(raw: bytes | memoryview) -> str:
    """The BLAKE3 (hex) of raw bytes: the only identity of content. Releases the GIL."""
    return blake3(raw).hexdigest()


def deflate(raw: bytes | memoryview, digest: str = "") -> Run:
    """Compress `raw` into one run. Equal input gives equal output on one kind of machine; releases the GIL.

    `digest` is its `content_digest`, where that is known already. Everything goes through one call of the compressor:
    ISA-L's output depends on the size of the writes.
    """
    return _describe(compress(raw), raw, digest)


def store_uncompressed(raw: bytes | memoryview, digest: str = "") -> Run:
    """Wrap `raw`, which is compressed already, into one run of stored blocks: 90 bytes more a MiB; releases the GIL."""
    # zlib's level 0 and not ISA-L's, which compresses with fixed codes and inflates random bytes by 23 %.
    compressor = zlib.compressobj(0, zlib.DEFLATED, _RAW_DEFLATE)
    return _describe(compressor.compress(raw) + compressor.flush(zlib.Z_FULL_FLUSH), raw, digest)


def compress(raw: bytes | memoryview) -> bytes:
    """The bytes of a run, without its digests."""
    compressor = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, _RAW_DEFLATE)
    return compressor.compress(raw) + compressor.flush(isal_zlib.Z_FULL_FLUSH)


def is_compressed(head: bytes) -> bool:
    """Whether a file that begins with `head` (12 bytes are enough) is a gzip, zstd, xz, bzip2 or lz4 file."""
    if head.startswith(_MAGICS):
        return True
    if head[:3] == b"BZh":
        return head[3:4].isdigit() and head[4:10] in _BZIP2_BLOCKS
    return len(head) >= 4 and head[0] >> 4 == 5 and head[1:4] == _SKIPPABLE_FRAME


def append_crc32(crc32: int, other: int, length: int, times: int = 1) -> int:
    """The CRC-32 of bytes with `crc32`, followed `times` times by `length` bytes whose own CRC-32 is `other`."""
    # By doubling what is appended: a hole of a terabyte is a million repetitions of the zero piece.
    while times:
        if times & 1:
            crc32 = isal_zlib.crc32_combine(crc32, other, length)
        times >>= 1
        if times:
            other = isal_zlib.crc32_combine(other, other, length)
            length *= 2
    return crc32


def _describe(data: bytes, raw: bytes | memoryview, digest: str) -> Run:
    length = raw.nbytes if isinstance(raw, memoryview) else len(raw)
    return Run(data, length, isal_zlib.crc32(raw), digest or content_digest(raw))
