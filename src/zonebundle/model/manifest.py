"""The manifest of a bundle: a header line, then one line an entry of the tar archive, in its order (JSON Lines).

The manifest is both the commit of a bundle in the store (by its rename) and the last entry of the archive. Format 2:

    {"manifest": 2, "zone": …, "bundle_id": …, "time_created": …, "version": 0, "cause": …, "hold_seconds": …,
     "graceful_seconds": …, "gaps": 0, "packed": bytes of all log pieces, "raw": bytes of all entries,
     "sources": {"zone": "/srv/web"}}
    {"path": "logs/zone/app.log", "size": …, "crc32": …, "mode": …, "mtime": nanoseconds, "cut": …,
     "pieces": [[segment, offset, packed, raw, crc32, blake3], …], "ino": …}

The digests of a piece are base64 (RFC 4648) without padding: hex would be a quarter of a manifest of whole logs.

A log `logs/<source>/<path>` was at `<path>` below the source's directory on the host, which `sources` tells; one that
was elsewhere has its path there as `from`.
A piece repeated n times (holes are one shared zero piece) has n as a seventh element. Entries without pieces have their
bytes in the bundle's frame. `cut` is the offset in the frame at which an entry's pieces are inserted, or at which the
deflate run begins that starts with the entry's own bytes.
"""

from __future__ import annotations

import binascii
import json
from dataclasses import dataclass, field
from typing import Any

import orjson

from zonebundle.errors import FormatError
from zonebundle.model.metadata import Cause, Metadata
from zonebundle.model.paths import path_from_json, path_to_json

MANIFEST_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """A byte range of a segment that is one full-flushed deflate run, so that it can be spliced by itself.

    `segment` is the BLAKE3 (hex) of the segment's file bytes; `offset` and `packed` are bytes in that file; `raw`,
    `crc32` and `blake3` (hex) are of the inflated bytes. `times` repeats the piece.
    """

    segment: str
    offset: int
    packed: int
    raw: int
    crc32: int
    blake3: str
    times: int = 1

    def to_json(self) -> list[Any]:
        fields: list[Any] = [self.segment, self.offset, self.packed, self.raw, self.crc32, self.blake3]
        return fields if self.times == 1 else [*fields, self.times]


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the archive. `path` is bytes as in the tar header, `mtime_ns` nanoseconds, `size` bytes.

    `inode` is a log's; `host_path` says where it was, if that is not below the directory of its source.
    """

    path: bytes
    size: int
    crc32: int
    mode: int = 0o600
    mtime_ns: int = 0
    pieces: tuple[Piece, ...] = ()
    cut: int = 0
    inode: int = 0
    host_path: bytes = b""

    def to_json(self) -> dict[str, Any]:
        data = path_to_json(self.path)
        data |= {"size": self.size, "crc32": self.crc32, "mode": self.mode, "mtime": self.mtime_ns}
        if self.cut:
            data["cut"] = self.cut
        if self.pieces:
            data["pieces"] = [_piece_to_json(piece) for piece in self.pieces]
        if self.inode:
            data["ino"] = self.inode
        if self.host_path:
            data |= path_to_json(self.host_path, "from")
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        return cls(
            path=path_from_json(data),
            size=data["size"],
            crc32=data["crc32"],
            mode=data["mode"],
            mtime_ns=data["mtime"],
            pieces=tuple(_piece_from_json(*fields) for fields in data.get("pieces", ())),
            cut=data.get("cut", 0),
            inode=data.get("ino", 0),
            host_path=path_from_json(data, "from") if "from" in data else b"",
        )


def digest_to_text(digest: str) -> str:
    """A BLAKE3 (hex) as the lines of a manifest have it."""
    return binascii.b2a_base64(bytes.fromhex(digest), newline=False)[:-1].decode("ascii")


def digest_from_text(text: str | bytes) -> str:
    """The BLAKE3 (hex) that `digest_to_text` wrote. Raises ValueError if it is none."""
    padded = text + "=" if isinstance(text, str) else text + b"="
    digest = binascii.a2b_base64(padded, strict_mode=True)
    if len(digest) != 32:
        raise ValueError(f"{text!r} is no digest")
    return digest.hex()


def _piece_to_json(piece: Piece) -> list[Any]:
    segment, offset, packed, raw, crc32, content, *times = piece.to_json()
    return [digest_to_text(segment), offset, packed, raw, crc32, digest_to_text(content), *times]


def _piece_from_json(
    segment: str, offset: int, packed: int, raw: int, crc32: int, content: str, times: int = 1
) -> Piece:
    return Piece(digest_from_text(segment), offset, packed, raw, crc32, digest_from_text(content), times)


@dataclass(frozen=True, slots=True)
class Header:
    """The manifest's first line: what a listing needs. `gaps` is their number, `packed` and `raw` are bytes.

    `sources` has the directory on the host of each source of logs.
    """

    metadata: Metadata
    hold_seconds: float = 0.0
    graceful_seconds: float = 0.0
    gaps: int = 0
    packed: int = 0
    raw: int = 0
    sources: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "manifest": MANIFEST_FORMAT,
            "zone": self.metadata.zone,
            "bundle_id": self.metadata.bundle_id,
            "time_created": self.metadata.time_created,
            "version": self.metadata.version,
            "cause": str(self.metadata.cause),
            "hold_seconds": round(self.hold_seconds, 6),
            "graceful_seconds": round(self.graceful_seconds, 6),
            "gaps": self.gaps,
            "packed": self.packed,
            "raw": self.raw,
            "sources": self.sources,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Header:
        if data.get("manifest") != MANIFEST_FORMAT:
            raise FormatError(
                f"manifest format {data.get('manifest')!r} is not {MANIFEST_FORMAT}: "
                "it was written by another version of zonebundle; use that one"
            )
        return cls(
            metadata=Metadata(
                zone=data["zone"],
                bundle_id=data["bundle_id"],
                time_created=data["time_created"],
                cause=Cause(data["cause"]),
                version=data["version"],
            ),
            hold_seconds=data["hold_seconds"],
            graceful_seconds=data["graceful_seconds"],
            gaps=data["gaps"],
            packed=data["packed"],
            raw=data["raw"],
            sources=data.get("sources", {}),
        )


def encode_line(data: dict[str, Any]) -> bytes:
    """One line of a JSON Lines file: UTF-8 without spaces, ended by a newline."""
    # A hold writes a line for each log, a seal too: the standard library's encoder takes 15 times as long.
    try:
        return orjson.dumps(data, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        # Text from the operating system that is no Unicode: escapes can tell of it.
        return json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n"


def decode_line(line: bytes) -> Any:
    """The value of such a line. Raises ValueError if it is none."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        # The escape of half a character pair, which `encode_line` may have written.
        return json.loads(line)
