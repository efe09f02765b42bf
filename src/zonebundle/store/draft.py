"""Writing a bundle into the store.

The directory is filled first, and becomes a bundle by one rename:

    segments durable → frame durable → manifest durable, under its temporary name → renamed to manifest.jsonl

Entries go to files as they come, so that a bundle of a million files needs no memory for them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from isal import isal_zlib

from zonebundle.errors import StoreError
from zonebundle.host import trace
from zonebundle.host.files import sync_directory
from zonebundle.model.manifest import Entry, Header, Piece, encode_line
from zonebundle.model.metadata import Metadata
from zonebundle.model.paths import printable
from zonebundle.store.bundle import FRAME, MANIFEST
from zonebundle.store.failure import explain, store_errors
from zonebundle.store.frame import FrameWriter, measure
from zonebundle.store.pieces import CHUNK
from zonebundle.store.store import Store
from zonebundle.store.tar import END_OF_ARCHIVE, entry_header, padding

_ENTRIES = "entries.tmp"
_MANIFEST_DRAFT = "manifest.tmp"
_BUFFER = 256 << 10
# Never set-user-ID and its like: the archive's files belong to root, and the zone chose the mode.
_PERMISSIONS = 0o777


class Origin(NamedTuple):
    """Where on the host a log was: `path` below the directory `root`, with this inode number."""

    root: str
    path: bytes
    inode: int


class BundleDraft:
    """A bundle that is being written, entry by entry in the order of the archive. One thread at a time.

    Its log pieces are put under the bundle's ID as the owner (`store.segments.put(runs, bundle_id)`), from any thread.
    Leaving the `with` block without `commit` abandons it.
    """

    def __init__(self, store: Store, metadata: Metadata, mtime: float) -> None:
        """`mtime`, seconds, is that of entries without one. Raises ConflictError if the bundle exists, StoreError."""
        self._store = store
        self._metadata = metadata
        self._mtime_ns = round(mtime * 1e9)
        self._owner = metadata.bundle_id
        # 64 bits a path and not the path: of a million files they are a third of the memory. Two names of one hash
        # would only cost the second its plain name.
        self._paths: set[int] = {hash(MANIFEST.encode())}
        self._padding = b""
        self._packed = 0
        self._raw = 0
        self._sources: dict[str, str] = {}
        self._open = True
        self._whole = True
        self._directory = store.make_draft(metadata.zone, metadata.bundle_id)
        store.segments.lease(self._owner)
        try:
            with store_errors(f"writing {self._directory}"):
                self._frame_file = _create(self._directory / FRAME)
                try:
                    self._entries_file = _create(self._directory / _ENTRIES)
                    self._frame = FrameWriter(self._frame_file)
                except BaseException:
                    self._frame_file.close()
                    raise
        except BaseException:
            store.segments.release(self._owner)
            store.remove_draft(self._directory)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open:
            self.abandon()

    def add_bytes(self, path: bytes, data: bytes, *, mode: int = 0o600, mtime_ns: int | None = None) -> bytes:
        """Add an entry that is kept with the bundle; returns its path, which differs if it was taken. StoreError."""
        return self.add_stream(path, len(data), (data,), mode=mode, mtime_ns=mtime_ns)

    def add_stream(
        self, path: bytes, size: int, chunks: Iterable[bytes], *, mode: int = 0o600, mtime_ns: int | None = None
    ) -> bytes:
        """As `add_bytes`, of `chunks` that are `size` bytes together. Raises ValueError if they are not."""
        mtime_ns = self._mtime_ns if mtime_ns is None else mtime_ns
        path = self._free(path)
        self._begin(path, size, mode, mtime_ns)
        try:
            cut = self._frame.cut() if size else 0
            crc32 = written = 0
            for chunk in chunks:
                self._frame.write(chunk)
                crc32 = isal_zlib.crc32(chunk, crc32)
                written += len(chunk)
            if written != size:
                raise ValueError(f"{printable(path)} has {written} bytes instead of {size}")
            self._end(Entry(path, size, crc32, mode & _PERMISSIONS, mtime_ns, (), cut))
        except OSError as error:
            raise explain(f"writing {self._directory}", error) from error
        return path

    def add_log(
        self,
        path: bytes,
        size: int,
        *,
        mode: int,
        mtime_ns: int,
        pieces: Sequence[Piece],
        origin: Origin | None = None,
    ) -> bytes:
        """Add a log of `size` bytes that are those of `pieces`; returns its path, which differs if it was taken.

        `path` is `logs/<source>/…`; of a log whose `origin` is not given none is told.

        Raises ValueError if the pieces have another length, or a segment that was not put under the bundle's ID;
        StoreError.
        """
        crc32, raw, packed = measure(pieces)
        if raw != size:
            raise ValueError(f"the pieces of {printable(path)} have {raw} bytes instead of {size}")
        for piece in pieces:
            if not self._store.segments.holds(self._owner, piece.segment):
                raise ValueError(f"a segment of {printable(path)} has no lease of bundle {self._owner}")
        path = self._free(path)
        self._begin(path, size, mode, mtime_ns)
        try:
            cut = self._frame.insert(crc32, raw) if pieces else 0
            self._packed += packed
            inode, host_path = (origin.inode, self._elsewhere(path, origin)) if origin else (0, b"")
            mode &= _PERMISSIONS
            self._end(Entry(path, size, crc32, mode, mtime_ns, tuple(pieces), cut, inode, host_path))
        except OSError as error:
            raise explain(f"writing {self._directory}", error) from error
        return path

    def commit(
        self,
        *,
        hold_seconds: float,
        graceful_seconds: float,
        gaps: int,
        check: Callable[[], None] = lambda: None,
        committed: Callable[[], None] | None = None,
    ) -> Header:
        """Make the bundle durable and visible; returns its header. Raises StoreError, then it can only be abandoned.

        `check` is called when all but its becoming visible is done, and may raise; `committed` when it is visible,
        before the leases on its segments end.
        """
        if not self._whole:
            raise StoreError(f"bundle {self._owner} has an entry that was not written to its end; seal it again")
        self._whole = False
        header = Header(self._metadata, hold_seconds, graceful_seconds, gaps, self._packed, self._raw, self._sources)
        segments = self._store.segments
        segments.flush()
        if missing := segments.missing(self._owner):
            raise StoreError(f"{len(missing)} segments of bundle {self._owner} could not be kept; seal it again")
        trace.point("seal.segments-durable")
        with store_errors(f"writing {self._directory}"):
            manifest = self._finish_frame(header)
            try:
                _make_durable(self._frame_file, self._frame.offset)
                trace.point("seal.frame-written")
                _make_durable(manifest)
            finally:
                manifest.close()
            os.unlink(self._directory / _ENTRIES)
            # The bundle's names up to the store's own directory: one above a name that is not durable helps nobody.
            for directory in (self._directory, self._directory.parent, self._directory.parent.parent):
                sync_directory(directory)
        trace.point("seal.manifest-written")
        check()
        self._store.publish(self._directory, _MANIFEST_DRAFT)
        trace.point("seal.committed")
        self._open = False
        self._close_files()
        try:
            if committed is not None:
                committed()
        finally:
            segments.release(self._owner)
        return header

    def abandon(self) -> None:
        """Remove what was written, and the segments that only this draft used. Nothing may be put for it any more.

        Raises StoreError; then the rest is removed by the store's next `recover` and `sweep`.
        """
        self._open = False
        self._close_files()
        # What was put and not flushed has no final name yet, under which it could be removed. Where the flush fails
        # it removes what it could not make durable, and a final name nobody has.
        with contextlib.suppress(StoreError):
            self._store.segments.flush()
        candidates = self._store.segments.release(self._owner)
        self._store.unpublish(self._directory)
        self._store.remove_draft(self._directory)
        self._store.remove_unreferenced(candidates)

    def _elsewhere(self, path: bytes, origin: Origin) -> bytes:
        """Where a log was on the host, if its entry's path and the directory of its source do not tell."""
        at = os.path.join(os.fsencode(origin.root), origin.path)
        source, _, below = path.removeprefix(b"logs/").partition(b"/")
        # The directory is told once, as a rule: the path in each line would be a fifth of the manifest.
        if at.endswith(b"/" + below):
            directory = os.fsdecode(at[: -len(below) - 1])
            if self._sources.setdefault(os.fsdecode(source), directory) == directory:
                return b""
        return at

    def _free(self, path: bytes) -> bytes:
        if not path or b"\0" in path or any(part in (b"", b".", b"..") for part in path.split(b"/")):
            raise ValueError(f"{printable(path)!r} cannot be the path of an entry")
        free = path
        number = 1
        while hash(free) in self._paths:
            number += 1
            free = b"%s.%d" % (path, number)
        self._paths.add(hash(free))
        return free

    def _begin(self, path: bytes, size: int, mode: int, mtime_ns: int) -> None:
        self._whole = False
        try:
            self._frame.write(self._padding + entry_header(path, size, mode & _PERMISSIONS, mtime_ns))
        except OSError as error:
            raise explain(f"writing {self._directory}", error) from error
        self._padding = padding(size)

    def _end(self, entry: Entry) -> None:
        self._entries_file.write(encode_line(entry.to_json()))
        self._raw += entry.size
        self._whole = True

    def _finish_frame(self, header: Header) -> BinaryIO:
        """Write the manifest, as a file and as the archive's last entry, and end the archive."""
        first = encode_line(header.to_json())
        self._entries_file.flush()
        manifest = _create(self._directory / _MANIFEST_DRAFT)
        try:
            with (self._directory / _ENTRIES).open("rb") as entries:
                size = len(first) + os.fstat(entries.fileno()).st_size
                self._begin(MANIFEST.encode(), size, 0o600, self._mtime_ns)
                chunk = first
                while chunk:
                    manifest.write(chunk)
                    self._frame.write(chunk)
                    chunk = entries.read(CHUNK)
            self._frame.write(self._padding + END_OF_ARCHIVE)
            self._frame.finish()
            if manifest.tell() != size:
                raise OSError(errno.EIO, "the list of entries is not as long as what was written")
        except BaseException:
            with contextlib.suppress(OSError):
                manifest.close()
            raise
        return manifest

    def _close_files(self) -> None:
        for file in (self._frame_file, self._entries_file):
            # Closing tries to write what is buffered. After a commit there is nothing, else it is thrown away.
            with contextlib.suppress(OSError):
                file.close()


def _create(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "wb", buffering=_BUFFER)


def _make_durable(file: BinaryIO, size: int | None = None) -> None:
    file.flush()
    if os.fstat(file.fileno()).st_size != (file.tell() if size is None else size):
        raise OSError(errno.EIO, "the file is not as long as what was written", file.name)
    os.fsync(file.fileno())
