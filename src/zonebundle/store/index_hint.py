"""The index as hold workers read it: beside the sealer that writes, without waiting for it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from zonebundle.store.index_rows import FAILURES, INDEX_FORMAT, KnownFile, decode_file, signed

# A file with more pieces is cheap to stage, compared with what it takes to tell them all.
HINTED_PIECES = 64
_PARAMETERS = 512
# Another thread of the worker asks for less than a millisecond, unless its disk hangs.
_PATIENCE = 0.05

_Place = tuple[int, int]


class IndexHint:
    """What a hold worker asks: read-only, without waiting for anybody, and without an error of its own.

    Threads may share it; a process that forks must not, once it was asked.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet, and nothing needs to exist."""
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._places: list[_Place] = []

    def known(self, filesystem: int, inodes: Sequence[int]) -> dict[int, KnownFile]:
        """By inode, what is known of these files of one file system. On any trouble nothing is known.

        Files of more than HINTED_PIECES pieces are not told. The states told may be old ones: compare the identities.
        """
        if not self._lock.acquire(timeout=_PATIENCE):
            return {}
        try:
            if self._connection is not None and self._places != self._look():
                # Removed, or made anew, by the sealer or by the operator: what is open here is nobody's any more.
                self._disconnect()
            return self._ask(self._connection or self._connect(), filesystem, inodes)
        except (*FAILURES, OSError, OverflowError):
            self._disconnect()
            return {}
        finally:
            self._lock.release()

    def close(self) -> None:
        """Give the descriptors back; the next question opens them again."""
        with self._lock:
            self._disconnect()

    def _connect(self) -> sqlite3.Connection:
        before = _place(str(self._path))
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)
        self._connection = connection
        if connection.execute("PRAGMA user_version").fetchone() != (INDEX_FORMAT,):
            raise sqlite3.DatabaseError("not an index of this format")
        # The first look at the database may have made the log.
        self._places = self._look()
        if self._places[0] != before:
            raise sqlite3.DatabaseError("another index has taken its place meanwhile")
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*FAILURES):
                connection.close()

    def _ask(self, connection: sqlite3.Connection, filesystem: int, inodes: Sequence[int]) -> dict[int, KnownFile]:
        known = {}
        for start in range(0, len(inodes), _PARAMETERS):
            asked = inodes[start : start + _PARAMETERS]
            # As many marks as the next power of two: each number of them is another statement, that costs more to
            # prepare than to run. The last inode fills up.
            numbers = list(map(signed, asked))
            numbers += numbers[-1:] * ((1 << (len(numbers) - 1).bit_length()) - len(numbers))
            marks = ",".join("?" * len(numbers))
            # All rows at once: a statement that is not read to its end keeps the log from being written anew.
            rows = connection.execute(
                f"SELECT data FROM files WHERE filesystem = ? AND inode IN ({marks}) AND pieces <= {HINTED_PIECES}",
                (signed(filesystem), *numbers),
            ).fetchall()
            wanted = set(asked)
            for (data,) in rows:
                file = decode_file(data)
                if file is not None and (key := file.key)[0] == filesystem and key[1] in wanted:
                    known[key[1]] = file
        return known

    def _look(self) -> list[_Place]:
        """Where the database and its log are. What is open keeps its inode: no other file can have that."""
        return [_place(str(self._path)), _place(f"{self._path}-wal")]


def _place(path: str) -> _Place:
    status = os.stat(path)
    return status.st_dev, status.st_ino
