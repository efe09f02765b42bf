"""A bundle in the store: `bundles/<zone>/<bundle-id>/` with `manifest.jsonl` and `frame`.

The directory is a bundle as long as `manifest.jsonl` is in it. Any process may read it at any time.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blake3 import blake3
from isal import isal_zlib

from zonebundle.errors import DamagedError, NoSuchBundleError, NotFoundError
from zonebundle.model.manifest import Entry, Header, decode_line, digest_from_text, encode_line
from zonebundle.model.paths import path_to_json, printable
from zonebundle.store.failure import store_errors
from zonebundle.store.segments import Segments

MANIFEST = "manifest.jsonl"
FRAME = "frame"
DELETED = "manifest.deleted"
"""What a deletion renames the manifest to: no bundle any more, but still the list of its segments."""

_BLOCK = 1 << 20
_HEADER_LIMIT = 64 << 10
# In JSON a quotation mark inside of a string has a backslash before it, so no path can look like this.
# In hex are the digests of capture records, and of manifests of format 1, whose segments are not nobody's either.
_SEGMENT = re.compile(rb'\["(?:([A-Za-z0-9+/]{43})|([0-9a-f]{64}))",')


@dataclass(frozen=True, slots=True)
class StoredBundle:
    """A committed bundle. `size` is the bytes of its tar.gz."""

    header: Header
    size: int
    directory: Path
    segments: Segments

    @property
    def manifest(self) -> Path:
        """The manifest's file; its bytes are those of the archive's last entry."""
        return self.directory / MANIFEST

    @property
    def etag(self) -> str:
        """The BLAKE3 (hex) of the manifest, read now. It names the bytes of the whole tar.gz."""
        digest = blake3()
        with self._open_manifest() as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def entries(self) -> Iterator[Entry]:
        """Every entry of the archive but the manifest, in its order, one at a time. Raises DamagedError."""
        with self._open_manifest() as file:
            file.readline()
            for number, line in enumerate(file, start=2):
                yield self._parse(line, number)

    def read_own(self, path: bytes) -> bytes:
        """The bytes of an entry that is kept in the frame: what zonebundle wrote, and the outputs.

        Raises NotFoundError if there is none of that path, or if it is a log; DamagedError.
        """
        entry = self._find_own(path)
        data = self._inflate(entry.cut, entry.size) if entry.size else b""
        if len(data) != entry.size or isal_zlib.crc32(data) != entry.crc32:
            raise DamagedError(f"the bytes of {printable(path)} in {self.directory / FRAME} are damaged; {_RESTORE}")
        return data

    def open_frame(self) -> int:
        """A descriptor of the frame, which the caller closes."""
        with store_errors(f"opening {self.directory / FRAME}"):
            try:
                return os.open(self.directory / FRAME, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise self._gone() from None

    @contextlib.contextmanager
    def _open_manifest(self) -> Iterator[IO[bytes]]:
        with store_errors(f"reading {self.manifest}"):
            try:
                file = self.manifest.open("rb")
            except FileNotFoundError:
                raise self._gone() from None
            with file:
                yield file

    def _gone(self) -> NoSuchBundleError:
        return NoSuchBundleError(self.header.metadata.zone, self.header.metadata.bundle_id)

    def _find_own(self, path: bytes) -> Entry:
        # Lines begin with the path: only the one that is looked for needs to be parsed.
        prefix = encode_line(path_to_json(path)).removesuffix(b"}\n")
        with self._open_manifest() as file:
            file.readline()
            for number, line in enumerate(file, start=2):
                if line.startswith(prefix):
                    entry = self._parse(line, number)
                    if entry.path == path and not entry.pieces:
                        return entry
        identity = self.header.metadata
        raise NotFoundError(
            f"bundle {identity.bundle_id} of '{identity.zone}' has no output or report {printable(path)}"
        )

    def _parse(self, line: bytes, number: int) -> Entry:
        try:
            return Entry.from_json(decode_line(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedError(f"line {number} of {self.manifest} is damaged; {_RESTORE}") from None

    def _inflate(self, offset: int, size: int) -> bytes:
        frame = self.open_frame()
        try:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            parts = []
            while size > 0 and (block := os.pread(frame, _BLOCK, offset)):
                offset += len(block)
                # Runs in a row are one stream, so an entry of many runs needs no further offsets.
                part = inflater.decompress(block, size)
                while part:
                    parts.append(part)
                    size -= len(part)
                    part = inflater.decompress(inflater.unconsumed_tail, size) if size else b""
            return b"".join(parts)
        except (OSError, zlib.error) as error:
            raise DamagedError(f"{self.directory / FRAME} cannot be read ({error}); {_RESTORE}") from error
        finally:
            os.close(frame)


_RESTORE = "restore the bundle from a copy of the store"


def load_bundle(directory: Path, segments: Segments) -> StoredBundle | None:
    """The bundle in `directory`, None if there is none. Raises DamagedError, FormatError, StoreError."""
    with store_errors(f"reading {directory}"):
        try:
            with (directory / MANIFEST).open("rb") as file:
                header = _parse_header(file.readline(_HEADER_LIMIT), directory)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            size = (directory / FRAME).stat().st_size
        except FileNotFoundError:
            if (directory / MANIFEST).exists():
                raise DamagedError(f"{directory / FRAME} is missing; {_RESTORE}") from None
            # A deletion came between.
            return None
    return StoredBundle(header, size + header.packed, directory, segments)


def segments_in(manifest: Path) -> Iterator[str]:
    """The segment (hex digest) of every piece in a manifest or a capture record, as often as it is used.

    Works on damaged ones too; raises OSError.
    It searches instead of parsing: 10,000 bundles have to be looked through before a segment is removed.
    """
    try:
        file = manifest.open("rb")
    except IsADirectoryError:
        # Debris, which must not keep a clean-up, or its own deletion, from being done.
        return
    with file:
        for line in file:
            for digest, in_hex in _SEGMENT.findall(line):
                yield digest_from_text(digest) if digest else in_hex.decode("ascii")


def _parse_header(line: bytes, directory: Path) -> Header:
    try:
        return Header.from_json(decode_line(line))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(f"the first line of {directory / MANIFEST} is damaged; {_RESTORE}") from None
