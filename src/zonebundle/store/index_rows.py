"""The rows of the index, and how they are checked.

Nobody vouches for the pages of a cache: each row ends with the CRC-32 of its bytes, and those repeat the key. A row
that is damaged, or found in the wrong place, is not taken for what it is not.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator

from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece

# Kept in the database as user_version. An index of any other format is made anew, never converted.
INDEX_FORMAT = 1

_CHECK = struct.Struct("<I")
_IDENTITY = struct.Struct("<QQqQqq")
# Segment, BLAKE3, offset, packed, raw, CRC-32, times.
_PIECE = struct.Struct("<32s32sQIIII")
_KEYS = struct.Struct("<q24xq24xQ16x")
_KEY = struct.Struct("<QQ")
# Of an identity: size, mtime, ctime.
_STATE = struct.Struct("<24xQqq")
# What a damaged database raises. Messages quote its bytes, which Python then cannot decode; lengths may be anything.
FAILURES = (sqlite3.Error, UnicodeDecodeError, MemoryError)
# What encoding raises for a value that has no place in a row: a stamp before 1677 or after 2262, a digest that is none.
UNKEEPABLE = (struct.error, ValueError, TypeError)


class KnownFile:
    """One state of a file, and the pieces that hold its bytes, in their order.

    Kept as the index has them: a hold asks for hundreds, and needs no more of them than `state` and `pieces_json`.
    """

    __slots__ = ("_body",)

    def __init__(self, identity: FileIdentity, pieces: Iterable[Piece]) -> None:
        """Raises one of UNKEEPABLE."""
        self._body = encode_identity(identity) + b"".join(map(encode_piece, pieces))

    @classmethod
    def of_row(cls, body: bytes) -> KnownFile:
        """The file in the checked bytes of a row."""
        file = cls.__new__(cls)
        file._body = body
        return file

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KnownFile) and self._body == other._body

    def __hash__(self) -> int:
        return hash(self._body)

    def __repr__(self) -> str:
        return f"KnownFile({self.identity!r}, {self.pieces!r})"

    @property
    def key(self) -> tuple[int, int]:
        """File system and inode."""
        return _KEY.unpack_from(self._body)

    @property
    def state(self) -> tuple[int, int, int]:
        """Size, mtime and ctime (ns)."""
        return _STATE.unpack_from(self._body)

    @property
    def identity(self) -> FileIdentity:
        return FileIdentity(*_IDENTITY.unpack_from(self._body))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return _pieces(self._body[_IDENTITY.size :])

    @property
    def pieces_json(self) -> str:
        """The list of the pieces' `to_json` in JSON."""
        pieces = [
            f'["{segment.hex()}",{offset},{packed},{raw},{crc32},"{content.hex()}"'
            + (f",{times}]" if times != 1 else "]")
            for segment, content, offset, packed, raw, crc32, times in _PIECE.iter_unpack(self._body[_IDENTITY.size :])
        ]
        return f"[{','.join(pieces)}]"


def signed(number: int) -> int:
    """A 64-bit number as SQLite can hold it: its integers have a sign, inodes and f_fsid have none."""
    return number if number < 1 << 63 else number - (1 << 64)


def digest_key(digest: str) -> int:
    """The first 8 bytes of a digest (hex), by which it is looked for; the row tells whether it is the right one."""
    return int.from_bytes(bytes.fromhex(digest[:16]), "little", signed=True)


def encode_piece(piece: Piece) -> bytes:
    """A piece as a part of a row. Raises one of UNKEEPABLE."""
    segment, content = bytes.fromhex(piece.segment), bytes.fromhex(piece.blake3)
    if len(segment) != 32 or len(content) != 32:
        raise ValueError("a digest has 32 bytes")
    return _PIECE.pack(segment, content, piece.offset, piece.packed, piece.raw, piece.crc32, piece.times)


def single(piece: bytes) -> bytes:
    """An encoded piece, once."""
    return piece[:-4] + b"\1\0\0\0"


def piece_keys(piece: bytes) -> tuple[int, int, int]:
    """The keys of an encoded piece's segment and content, and its offset."""
    segment, content, offset = _KEYS.unpack(piece)
    return segment, content, signed(offset)


def encode_identity(identity: FileIdentity) -> bytes:
    """An identity as the first part of a file's row. Raises one of UNKEEPABLE."""
    return _IDENTITY.pack(
        identity.filesystem, identity.inode, identity.born_ns, identity.size, identity.mtime_ns, identity.ctime_ns
    )


def with_check(body: bytes) -> bytes:
    """A row's bytes, ended by their checksum."""
    return body + _CHECK.pack(zlib.crc32(body))


def checked(data: object) -> bytes | None:
    """The bytes of a row without their checksum; None if they are not those that were written."""
    # A damaged page may as well hold a number, or nothing, where bytes were.
    if not isinstance(data, bytes) or len(data) <= _CHECK.size:
        return None
    body = data[: -_CHECK.size]
    return body if zlib.crc32(body) == _CHECK.unpack_from(data, len(body))[0] else None


def with_identity(identity: bytes, body: bytes) -> bytes:
    """A file's checked bytes with another (encoded) identity."""
    return identity + body[_IDENTITY.size :]


def segments_in(body: bytes) -> Iterator[str]:
    """The segment of each piece in a file's checked bytes."""
    for start in range(_IDENTITY.size, len(body), _PIECE.size):
        yield body[start : start + 32].hex()


def segment_keys_in(body: bytes) -> set[int]:
    """The keys of the segments in a file's checked bytes."""
    return {keys[0] for keys in _KEYS.iter_unpack(body[_IDENTITY.size :])}


def decode_piece(data: object) -> Piece | None:
    """The piece in a row of its own; None if it is damaged."""
    body = checked(data)
    if body is None or len(body) != _PIECE.size:
        return None
    return _pieces(body)[0]


def decode_file(data: object) -> KnownFile | None:
    """The file in a row; None if it is damaged."""
    body = checked(data)
    if body is None or len(body) < _IDENTITY.size or (len(body) - _IDENTITY.size) % _PIECE.size:
        return None
    return KnownFile.of_row(body)


def _pieces(body: bytes) -> tuple[Piece, ...]:
    return tuple(
        [
            Piece(segment.hex(), offset, packed, raw, crc32, content.hex(), times)
            for segment, content, offset, packed, raw, crc32, times in _PIECE.iter_unpack(body)
        ]
    )
