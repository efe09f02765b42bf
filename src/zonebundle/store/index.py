"""What the sealer has seen: which pieces hold a file, and which piece holds a content. `<state-dir>/index.sqlite`.

The index is a cache. It may be deleted at any time, and it never fails a seal: once the database cannot be read or
written, the index gives it up. It logs that, removes the files, knows nothing from then on, and the next start makes a
new one. One thing only must not go wrong: an index that leads to segments that are gone. So `forget` returns when
nothing on the disk leads there any more, be it by a durable transaction or because the whole database is gone.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import structlog

from zonebundle.errors import StoreError
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece
from zonebundle.store import index_database as database
from zonebundle.store.failure import store_errors
from zonebundle.store.index_database import Key
from zonebundle.store.index_hint import IndexHint
from zonebundle.store.index_rows import (
    FAILURES,
    UNKEEPABLE,
    KnownFile,
    decode_file,
    decode_piece,
    digest_key,
    encode_identity,
    encode_piece,
    piece_keys,
    segments_in,
    signed,
    single,
    with_check,
    with_identity,
)

__all__ = ["Index", "IndexHint", "KnownFile"]

_T = TypeVar("_T")
_log = structlog.get_logger()

# Files and pieces a transaction: what others may have to wait for, and what is in memory at a time.
_BATCH = 16384


class Index:
    """The sealer's index: one writer. Methods may be called from any thread.

    No error of the database comes out, except from `forget`. `is_fresh`: it was made anew and has not been rebuilt
    since. `is_broken`: it knows nothing and keeps nothing until the next start.
    """

    @classmethod
    def open(cls, path: Path, stores: Sequence[str]) -> Index:
        """Open the index at `path`, or make it anew if it is missing, damaged or of another version.

        It is also made anew if it was made for none of `stores`, the IDs of the store directories.
        """
        index = cls(path)
        try:
            try:
                index._connection = database.open_existing(path, stores)
            except (*FAILURES, OSError) as error:
                if not isinstance(error, FileNotFoundError):
                    _log.warning("the index is made anew", index=str(path), reason=str(error))
                database.remove(path)
                index._connection = database.make(path, stores)
            index.is_fresh = not database.is_fact(index._connection, database.REBUILT)
        except (*FAILURES, OSError) as error:
            index._give_up("open", error)
        return index

    def __init__(self, path: Path) -> None:
        """Not to be called: see `open`."""
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._is_removed = False
        self.is_fresh = False
        self.is_broken = False

    def close(self) -> None:
        """Close the database. Whatever is asked afterwards is not known."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                with contextlib.suppress(*FAILURES):
                    connection.execute("INSERT OR IGNORE INTO facts VALUES (?)", (database.CLOSED,))
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                database.close(connection)

    def find_file(self, filesystem: int, inode: int) -> KnownFile | None:
        """The state of a file that is known; compare its identity."""
        return self.find_files([(filesystem, inode)]).get((filesystem, inode))

    def find_files(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], KnownFile]:
        """Those of these files (file system, inode) that are known, as `find_file` gives them."""

        def find(connection: sqlite3.Connection, keys: Sequence[Key]) -> dict[tuple[int, int], KnownFile]:
            found = {}
            for *key, data in database.files_data(connection, keys):
                file = decode_file(data)
                if file is None or [signed(file.identity.filesystem), signed(file.identity.inode)] != key:
                    raise database.damage("files")
                found[file.identity.filesystem, file.identity.inode] = file
            return found

        nothing: dict[tuple[int, int], KnownFile] = {}
        files: dict[tuple[int, int], KnownFile] = {}
        for keys in database.chunks((signed(filesystem), signed(inode)) for filesystem, inode in wanted):
            files |= self._ask("looking for files", functools.partial(find, keys=keys), nothing)
        return files

    def find_pieces(self, wanted: Mapping[str, int]) -> dict[str, Piece]:
        """By their content, BLAKE3 (hex) → raw bytes: pieces that hold it, each to be used once."""

        def find(connection: sqlite3.Connection, keys: Sequence[int]) -> dict[str, Piece]:
            rows = connection.execute(
                "SELECT data FROM contents CROSS JOIN pieces USING (segment, offset)"
                f" WHERE content IN {database.marks(len(keys))}",
                keys,
            )
            found = {}
            for (data,) in rows:
                piece = decode_piece(data)
                if piece is None:
                    raise database.damage("pieces")
                # Two contents may have one key.
                if wanted.get(piece.blake3) == piece.raw:
                    found[piece.blake3] = piece
            return found

        nothing: dict[str, Piece] = {}
        pieces: dict[str, Piece] = {}
        for keys in database.chunks(map(digest_key, wanted)):
            pieces |= self._ask("looking for pieces", functools.partial(find, keys=keys), nothing)
        return pieces

    def add(self, files: Iterable[tuple[FileIdentity, Sequence[Piece]]], pieces: Iterable[Piece] = ()) -> None:
        """Know these files by their pieces, and all pieces by their content. Their segments must be durable.

        What was known of the same file is replaced; its claims stay. Files that are empty, or have stamps that cannot
        be kept (see UNKEEPABLE), become unknown. Some thousand rows are one transaction.
        """
        for batch in _batches(files, pieces):
            self._change("adding files", batch.write, None)

    def renew(self, changes: Iterable[tuple[FileIdentity, int]]) -> None:
        """Our own link() or unlink() changed the ctime of these files, which are otherwise as in the index.

        Files whose identity in the index is not the one given are left alone.
        """

        def renew(connection: sqlite3.Connection, changes: Iterable[tuple[FileIdentity, int]]) -> None:
            for identity, ctime_ns in changes:
                try:
                    old = encode_identity(identity)
                    new = old[:-8] + ctime_ns.to_bytes(8, "little", signed=True)
                except (*UNKEEPABLE, OverflowError):
                    continue
                key = (signed(identity.filesystem), signed(identity.inode))
                body = database.file_body(connection, key)
                if body is not None and body.startswith(old):
                    connection.execute(
                        "UPDATE files SET data = ? WHERE filesystem = ? AND inode = ?",
                        (with_check(with_identity(new, body)), *key),
                    )

        for chunk in database.chunks(changes):
            self._change("renewing files", functools.partial(renew, changes=chunk), None)

    def claim(self, zone: str, files: Iterable[tuple[int, int]]) -> None:
        """Protect the segments of these files (file system, inode) of a living zone, known now or later."""
        for chunk in database.chunks(files):
            rows = [(database.encode_zone(zone), signed(filesystem), signed(inode)) for filesystem, inode in chunk]
            self._change("claiming files", functools.partial(database.insert, table="claims", rows=rows), None)

    def end_claims(self, zone: str, keep: Collection[tuple[int, int]]) -> set[str]:
        """End the claims of the zone on all files but `keep`; returns the segments that nobody claims any more."""
        kept = {(signed(filesystem), signed(inode)) for filesystem, inode in keep}

        def end(connection: sqlite3.Connection) -> set[str]:
            return database.end_claims(connection, database.encode_zone(zone), kept)

        return self._change("ending claims", end, set())

    def end_zones(self, living: Collection[str]) -> set[str]:
        """End the claims of all zones but `living`; returns the segments that nobody claims any more."""
        kept = {database.encode_zone(zone) for zone in living}

        def end(connection: sqlite3.Connection) -> set[str]:
            zones = connection.execute("SELECT DISTINCT zone FROM claims").fetchall()
            ended = [database.end_claims(connection, zone, set()) for (zone,) in zones if zone not in kept]
            # A segment that two of them claimed came free with the second.
            return set().union(*ended)

        return self._change("ending the claims of zones", end, set())

    def release_claims(self, digests: Collection[str]) -> None:
        """End all claims on the files that use these segments: the store is over its limit."""

        def release(connection: sqlite3.Connection, keys: Sequence[int]) -> None:
            connection.execute(
                "DELETE FROM claims WHERE (filesystem, inode) IN"
                f" (SELECT filesystem, inode FROM uses WHERE segment IN {database.marks(len(keys))})",
                keys,
            )

        for keys in database.chunks(map(digest_key, digests)):
            self._change("releasing claims", functools.partial(release, keys=keys), None)

    def claimed(self, digests: Collection[str]) -> set[str]:
        """Those of the segments that a claimed file uses."""
        return self._ask("looking for claims", functools.partial(database.claimed, digests=digests), set())

    def claimed_segments(self) -> Iterator[str]:
        """The segments that claimed files use; one that several use may come several times."""
        nothing: list[Key] = []
        last = (-(1 << 63), -(1 << 63))
        while page := self._ask("listing claims", functools.partial(database.claimed_files, after=last), nothing):
            for key in page:
                body = self._ask("reading a claimed file", functools.partial(database.file_body, key=key), None)
                if body is not None:
                    yield from segments_in(body)
            last = page[-1]

    def forget(self, digests: Collection[str]) -> None:
        """These segments are about to be removed: nothing leads to them any more, even after a power cut.

        Raises StoreError if that cannot be said, neither of the database nor of its removal: keep the segments then.
        """
        for keys in database.chunks(map(digest_key, digests)):
            self._change("forgetting segments", functools.partial(database.forget, keys=keys), None, is_durable=True)
        with self._lock:
            if self._connection is None and not self._is_removed:
                if not self.is_broken:
                    raise StoreError(f"index {self._path} is closed; segments are forgotten by an open one")
                with store_errors(f"removing the broken index {self._path}"):
                    database.remove(self._path)
                self._is_removed = True

    def rebuild(self, pieces: Iterable[Piece]) -> None:
        """Know the pieces of all manifests again, as they come. Once it has ended, the index is fresh no longer."""
        self.add((), pieces)
        self._change(
            "ending the rebuild", functools.partial(database.insert, table="facts", rows=[(database.REBUILT,)]), None
        )
        self.is_fresh = False

    def _ask(self, doing: str, work: Callable[[sqlite3.Connection], _T], nothing: _T) -> _T:
        with self._lock:
            if self._connection is None:
                return nothing
            try:
                return work(self._connection)
            except FAILURES as error:
                self._give_up(doing, error)
                return nothing

    def _change(
        self, doing: str, work: Callable[[sqlite3.Connection], _T], nothing: _T, *, is_durable: bool = False
    ) -> _T:
        def change(connection: sqlite3.Connection) -> _T:
            if is_durable:
                connection.execute("PRAGMA synchronous = FULL")
            with database.transaction(connection):
                result = work(connection)
            if is_durable:
                connection.execute("PRAGMA synchronous = NORMAL")
            return result

        return self._ask(doing, change, nothing)

    def _give_up(self, doing: str, error: Exception) -> None:
        connection, self._connection = self._connection, None
        self.is_broken = True
        self.is_fresh = False
        try:
            # Before it is closed, which writes. What stays is old, not wrong: all it lacks is what came later.
            database.remove(self._path)
            self._is_removed = True
        except OSError as failure:
            _log.warning("the broken index stays until it can be removed", index=str(self._path), error=str(failure))
        if connection is not None:
            database.close(connection)
        _log.warning(
            "the index failed; the next start makes it anew", index=str(self._path), doing=doing, error=str(error)
        )


class _Batch:
    """Rows that are written in one transaction."""

    def __init__(self) -> None:
        # The row of a file, and the segment of each of its pieces; one without pieces becomes unknown.
        self.files: dict[Key, tuple[bytes, Sequence[int]]] = {}
        self.pieces: dict[Key, tuple[int, bytes]] = {}

    def add_piece(self, piece: Piece) -> tuple[int, bytes]:
        encoded = encode_piece(piece)
        segment, content, offset = piece_keys(encoded)
        self.pieces[segment, offset] = (content, encoded if piece.times == 1 else single(encoded))
        return segment, encoded

    def add_file(self, identity: FileIdentity, pieces: Sequence[Piece]) -> None:
        key = (signed(identity.filesystem), signed(identity.inode))
        try:
            segments, encoded = zip(*[self.add_piece(piece) for piece in pieces], strict=True) if pieces else ((), ())
            self.files[key] = (with_check(encode_identity(identity) + b"".join(encoded)), segments)
        except UNKEEPABLE:
            self.files[key] = (b"", ())

    def __len__(self) -> int:
        return len(self.files) + len(self.pieces)

    def write(self, connection: sqlite3.Connection) -> None:
        self._write_files(connection)
        database.insert(
            connection,
            "pieces",
            [(*key, with_check(piece)) for key, (_, piece) in self.pieces.items()],
            # A log that has grown comes with all its old pieces: what is there already makes no page dirty.
            "ON CONFLICT DO UPDATE SET data = excluded.data WHERE data <> excluded.data",
        )
        # In the order of the table a page is looked for once.
        database.insert(connection, "contents", sorted((content, *key) for key, (content, _) in self.pieces.items()))

    def _write_files(self, connection: sqlite3.Connection) -> None:
        before = database.segments_before(connection, self.files)
        kept, forgotten, gone, uses = [], [], [], []
        for key, (data, segments) in self.files.items():
            if old := before.get(key):
                new = set(segments)
                gone += [(segment, *key) for segment in old - new]
                uses += [(segment, *key) for segment in new - old]
            else:
                uses += [(segment, *key) for segment in segments]
            if segments:
                kept.append((*key, len(segments), data))
            elif old:
                forgotten.append(key)
        connection.executemany("DELETE FROM uses WHERE segment = ? AND filesystem = ? AND inode = ?", gone)
        connection.executemany("DELETE FROM files WHERE filesystem = ? AND inode = ?", forgotten)
        database.insert(
            connection, "files", kept, "ON CONFLICT DO UPDATE SET pieces = excluded.pieces, data = excluded.data"
        )
        database.insert(connection, "uses", sorted(uses))


def _batches(files: Iterable[tuple[FileIdentity, Sequence[Piece]]], pieces: Iterable[Piece]) -> Iterator[_Batch]:
    batch = _Batch()
    for identity, parts in files:
        batch.add_file(identity, parts)
        if len(batch) >= _BATCH:
            yield batch
            batch = _Batch()
    for piece in pieces:
        with contextlib.suppress(*UNKEEPABLE):
            batch.add_piece(piece)
        if len(batch) >= _BATCH:
            yield batch
            batch = _Batch()
    if len(batch):
        yield batch
