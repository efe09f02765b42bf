"""The database of the index: its tables, how it is opened, made and removed, and the statements of many rows.

    files     one state of a file and its pieces       uses      segment → files
    pieces    one piece, by segment and offset         contents  BLAKE3 → pieces
    claims    zone → files whose segments are kept     facts     whom it was made for, how it was left

Segments and contents are looked for by the first 8 bytes of their digests, the rows hold them whole. Should two
segments ever share those bytes, more is forgotten than had to be, or one of their pieces is not found.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from zonebundle.host.files import sync_directory
from zonebundle.store.index_rows import (
    FAILURES,
    INDEX_FORMAT,
    checked,
    digest_key,
    piece_keys,
    segment_keys_in,
    segments_in,
)

Key = tuple[int, int]
_T = TypeVar("_T")

_SCHEMA = (
    "CREATE TABLE facts (fact TEXT PRIMARY KEY) WITHOUT ROWID",
    (
        "CREATE TABLE files (filesystem INTEGER, inode INTEGER, pieces INTEGER, data BLOB,"
        " PRIMARY KEY (filesystem, inode)) WITHOUT ROWID"
    ),
    (
        "CREATE TABLE uses (segment INTEGER, filesystem INTEGER, inode INTEGER,"
        " PRIMARY KEY (segment, filesystem, inode)) WITHOUT ROWID"
    ),
    # Two tables: contents come in no order at all, and rows of 24 bytes spread over a quarter of the pages.
    "CREATE TABLE pieces (segment INTEGER, offset INTEGER, data BLOB, PRIMARY KEY (segment, offset)) WITHOUT ROWID",
    (
        "CREATE TABLE contents (content INTEGER, segment INTEGER, offset INTEGER,"
        " PRIMARY KEY (content, segment, offset)) WITHOUT ROWID"
    ),
    (
        "CREATE TABLE claims (zone BLOB, filesystem INTEGER, inode INTEGER,"
        " PRIMARY KEY (zone, filesystem, inode)) WITHOUT ROWID"
    ),
    "CREATE INDEX claims_by_file ON claims (filesystem, inode)",
)
_PRAGMAS = (
    # A commit may be lost in a power cut, but not the order of commits; `forget` asks for more.
    "synchronous = NORMAL",
    # Pages of 4 KiB: a checkpoint each 16 MiB of log, which is cut to that after a burst.
    "wal_autocheckpoint = 4000",
    f"journal_size_limit = {16 << 20}",
    f"cache_size = {-8 << 10}",
    # A file that is truncated while it is mapped kills its reader.
    "mmap_size = 0",
    "temp_store = MEMORY",
    # Some distributions build SQLite so that it overwrites what is deleted with zeros.
    "secure_delete = OFF",
    "cell_size_check = ON",
)
# Rows a statement: sqlite3 gives the interpreter's lock away at each step, and beside a busy thread gets it back only
# after 5 ms. It also takes half the CPU.
_ROWS = 200
CLOSED = "closed"
REBUILT = "rebuilt"


class _Unusable(sqlite3.DatabaseError):
    """The database is well, but is not one to go on with."""


def open_existing(path: Path, stores: Collection[str]) -> sqlite3.Connection:
    """The index at `path`, if it is one to go on with. Raises OSError or one of FAILURES."""
    os.stat(path)
    has_log = _size(path.with_name(f"{path.name}-wal")) > 0
    connection = _connect(path)
    try:
        if connection.execute("PRAGMA user_version").fetchone() != (INDEX_FORMAT,):
            raise _Unusable("it has another format")
        schema = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
        if schema != set(_SCHEMA):
            raise _Unusable("its tables are others")
        if not any(is_fact(connection, _store_fact(store)) for store in stores):
            raise _Unusable("it was made for other stores")
        # Without the log that belongs to it, a database is an older one: before the last `forget`, maybe.
        if not has_log and not is_fact(connection, CLOSED):
            raise _Unusable("its write-ahead log is missing")
        connection.execute("DELETE FROM facts WHERE fact = ?", (CLOSED,))
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except BaseException:
        close(connection)
        raise
    return connection


def make(path: Path, stores: Iterable[str]) -> sqlite3.Connection:
    """A new index at `path`, where there is nothing. Raises OSError or one of FAILURES."""
    # SQLite gives its other files the mode of this one.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = _connect(path)
    try:
        if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise _Unusable("its file system cannot have a write-ahead log")
        with transaction(connection):
            for statement in _SCHEMA:
                connection.execute(statement)
            insert(connection, "facts", [(_store_fact(store),) for store in sorted(set(stores))])
            connection.execute(f"PRAGMA user_version = {INDEX_FORMAT}")
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except BaseException:
        close(connection)
        raise
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    # Somebody may hold the lock for a moment: a hint that goes, an operator who looks.
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        close(connection)
        raise
    return connection


def close(connection: sqlite3.Connection) -> None:
    """Close it, whatever state it is in."""
    with contextlib.suppress(*FAILURES):
        connection.close()


def remove(path: Path) -> None:
    """Remove the database and what belongs to it, durably. Raises OSError."""
    # The log goes after the database: without its log, a database is an older one.
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}{suffix}")
    sync_directory(path.parent)


def is_fact(connection: sqlite3.Connection, fact: str) -> bool:
    """Whether that was noted of the index."""
    return connection.execute("SELECT 1 FROM facts WHERE fact = ?", (fact,)).fetchone() is not None


def _store_fact(store: str) -> str:
    return f"store {store}"


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    """The items in lists for one statement each."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, _ROWS)):
        yield chunk


@functools.cache
def marks(count: int) -> str:
    """So many placeholders, in parentheses."""
    return f"({','.join('?' * count)})"


@functools.cache
def _rows_of_marks(count: int, width: int) -> str:
    return ",".join([marks(width)] * count)


def insert(connection: sqlite3.Connection, table: str, rows: Sequence[tuple[Any, ...]], conflict: str = "") -> None:
    """Insert rows; one that is there already stays, unless `conflict` says otherwise."""
    for chunk in chunks(rows):
        values = _rows_of_marks(len(chunk), len(chunk[0]))
        connection.execute(
            f"INSERT INTO {table} VALUES {values} {conflict or 'ON CONFLICT DO NOTHING'}",
            list(itertools.chain.from_iterable(chunk)),
        )


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """What the body changes happens as a whole, or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(*FAILURES):
            connection.execute("ROLLBACK")
        raise


def damage(table: str) -> sqlite3.DatabaseError:
    """The error for a row that fails its check."""
    return sqlite3.DatabaseError(f"a row of {table} is not what was written")


def encode_zone(zone: str) -> bytes:
    """A zone's name as the key of its claims: not every str is a text to SQLite."""
    return zone.encode("utf-8", "surrogatepass")


def file_data(connection: sqlite3.Connection, key: Key) -> Any:
    """The row of a file as it was found, or None."""
    row = connection.execute("SELECT data FROM files WHERE filesystem = ? AND inode = ?", key).fetchone()
    return None if row is None else row[0]


def files_data(connection: sqlite3.Connection, keys: Sequence[Key]) -> list[tuple[int, int, Any]]:
    """The rows (file system, inode, data) of those of the files that are there, as they were found."""
    return connection.execute(
        f"WITH wanted (filesystem, inode) AS (VALUES {_rows_of_marks(len(keys), 2)})"
        " SELECT filesystem, inode, data FROM wanted CROSS JOIN files USING (filesystem, inode)",
        list(itertools.chain.from_iterable(keys)),
    ).fetchall()


def file_body(connection: sqlite3.Connection, key: Key) -> bytes | None:
    """The checked bytes of a file's row, or None. Raises sqlite3.Error if they are damaged."""
    data = file_data(connection, key)
    return None if data is None else _body(data)


def _body(data: object) -> bytes:
    body = checked(data)
    if body is None:
        raise damage("files")
    return body


def segments_before(connection: sqlite3.Connection, files: Iterable[Key]) -> dict[Key, set[int]]:
    """The segments (keys) of those of the files that are known."""
    before = {}
    for filesystem, keys in itertools.groupby(sorted(files), lambda key: key[0]):
        for chunk in chunks(keys):
            rows = connection.execute(
                f"SELECT filesystem, inode, data FROM files WHERE filesystem = ? AND inode IN {marks(len(chunk))}",
                (filesystem, *(inode for _, inode in chunk)),
            )
            for *key, data in rows:
                before[key[0], key[1]] = segment_keys_in(_body(data))
    return before


def claimed(connection: sqlite3.Connection, digests: Iterable[str]) -> set[str]:
    """Those of the segments that a claimed file uses."""
    in_use = set[str]()
    for chunk in chunks(digests):
        by_key = {digest_key(digest): digest for digest in chunk}
        rows = connection.execute(
            f"SELECT DISTINCT segment FROM uses AS used WHERE segment IN {marks(len(by_key))} AND EXISTS (SELECT 1"
            " FROM claims WHERE claims.filesystem = used.filesystem AND claims.inode = used.inode)",
            list(by_key),
        ).fetchall()
        found = {key for (key,) in rows}
        in_use |= {digest for digest in chunk if digest_key(digest) in found}
    return in_use


def claimed_files(connection: sqlite3.Connection, after: Key) -> list[Key]:
    """The next claimed files after that one, in the order of their keys."""
    page: list[Key] = connection.execute(
        "SELECT DISTINCT filesystem, inode FROM claims WHERE (filesystem, inode) > (?, ?)"
        f" ORDER BY filesystem, inode LIMIT {_ROWS}",
        after,
    ).fetchall()
    # A damaged tree may lead in circles.
    for key in page:
        if not all(isinstance(number, int) for number in key) or key <= after:
            raise damage("claims")
        after = key
    return page


def end_claims(connection: sqlite3.Connection, zone: bytes, kept: Collection[Key]) -> set[str]:
    """End the claims of a zone on all files but those; returns the segments that nobody claims any more."""
    claims = connection.execute("SELECT filesystem, inode FROM claims WHERE zone = ?", (zone,)).fetchall()
    ended = [key for key in claims if key not in kept]
    connection.executemany(
        "DELETE FROM claims WHERE zone = ? AND filesystem = ? AND inode = ?", [(zone, *key) for key in ended]
    )
    segments = set[str]()
    for key in ended:
        segments.update(segments_in(file_body(connection, key) or b""))
    return segments - claimed(connection, segments)


def forget(connection: sqlite3.Connection, keys: Sequence[int]) -> None:
    """Remove the segments with these keys, and everything that leads to them."""
    listed = marks(len(keys))
    files = connection.execute(
        f"SELECT DISTINCT filesystem, inode FROM uses WHERE segment IN {listed}", keys
    ).fetchall()
    for key in files:
        # A file of many segments is found by each of them, and forgotten with the first.
        used = [(segment, *key) for segment in segment_keys_in(file_body(connection, key) or b"")]
        connection.executemany("DELETE FROM uses WHERE segment = ? AND filesystem = ? AND inode = ?", used)
        connection.execute("DELETE FROM files WHERE filesystem = ? AND inode = ?", key)
    contents = []
    for (data,) in connection.execute(f"SELECT data FROM pieces WHERE segment IN {listed}", keys):
        body = checked(data)
        if body is None:
            raise damage("pieces")
        segment, content, offset = piece_keys(body)
        contents.append((content, segment, offset))
    connection.executemany("DELETE FROM contents WHERE content = ? AND segment = ? AND offset = ?", contents)
    for table in ("pieces", "uses"):
        connection.execute(f"DELETE FROM {table} WHERE segment IN {listed}", keys)
