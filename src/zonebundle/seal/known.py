"""What one bundle need not make again: files and contents that the index knows, and whose segments are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import structlog

from zonebundle.errors import DamagedError, StoreError
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece
from zonebundle.store.index import Index, KnownFile
from zonebundle.store.replicate import fetch_segments
from zonebundle.store.store import Store

_log = structlog.get_logger()

# So many pieces are told to the index at a time: a bundle may have millions.
_BATCH = 8192


class Known:
    """Pieces for the bundle `owner`. `file` and `note` belong to one thread, `contents` may be called from any.

    Whatever is given has its segments leased to the owner: it is there, and stays.
    """

    def __init__(self, index: Index | None, store: Store, owner: str, others: Sequence[Store] = ()) -> None:
        """`others` are further stores, which may have a segment that `store` lacks."""
        self._index = index
        self._store = store
        self._segments = store.segments
        self._others = [other.segments for other in others if other is not store]
        self._owner = owner
        self._noted: list[tuple[FileIdentity, tuple[Piece, ...]]] = []
        self._noted_pieces = 0
        self._foreseen: dict[tuple[int, int], KnownFile | None] = {}

    def foresee(self, identities: Iterable[FileIdentity | None]) -> None:
        """Look for all files at once that `file` will be asked for next: one by one takes four times as long."""
        if self._index is not None:
            keys = [(identity.filesystem, identity.inode) for identity in identities if identity is not None]
            self._foreseen = dict.fromkeys(keys) | self._index.find_files(keys)

    def file(self, identity: FileIdentity | None) -> tuple[FileIdentity, list[Piece]] | None:
        """A file in exactly this state, as the index has it, and its pieces; None if it has to be read.

        An identity without a time of birth is taken by the rest of it: it is that of a file which we have linked.
        """
        if identity is None or self._index is None:
            return None
        key = identity.filesystem, identity.inode
        known = self._foreseen[key] if key in self._foreseen else self._index.find_file(*key)
        if known is None or _without_birth(known.identity) != _without_birth(identity):
            return None
        if identity.born_ns not in (0, known.identity.born_ns) or not self._lease(known.pieces):
            return None
        return known.identity, list(known.pieces)

    def recorded(self, pieces: Sequence[Piece]) -> bool:
        """Whether the pieces that a record names are there still, or can be had from another store."""
        if self._lease(pieces):
            return True
        digests = {piece.segment for piece in pieces}
        try:
            fetch_segments(digests, self._store, self._owner, self._others, set())
        except StoreError as error:
            _log.warning("a log that was known is read at its place", bundle=self._owner, reason=str(error))
            return False
        return True

    def contents(self, wanted: Mapping[str, int]) -> dict[str, Piece]:
        """By their content, BLAKE3 (hex) → raw bytes: the pieces that hold it."""
        if self._index is None:
            return {}
        found = self._index.find_pieces(wanted)
        return {digest: piece for digest, piece in found.items() if self._lease((piece,))}

    def _lease(self, pieces: Sequence[Piece]) -> bool:
        digests = {piece.segment for piece in pieces}
        try:
            self._segments.lease(self._owner, [one for one in digests if not self._segments.holds(self._owner, one)])
        except DamagedError:
            # Another store dir may have it; here it is made again.
            return False
        return True

    def note(self, identity: FileIdentity | None, pieces: Sequence[Piece]) -> None:
        """Remember what became of a file. None: its state is not certain, but its contents are."""
        if self._index is None or not pieces:
            return
        self._noted.append((identity or _NOBODY, tuple(pieces)))
        self._noted_pieces += len(pieces)
        if self._noted_pieces >= _BATCH:
            # The index leads to what is durable, and to nothing else: another's flush may have taken some, and failed.
            self._segments.flush()
            if self._segments.missing(self._owner):
                self._forget()
            else:
                self.keep()

    def keep(self) -> None:
        """Tell the index of what was noted, which is durable, and still leased."""
        if self._index is not None and self._noted:
            files = [noted for noted in self._noted if noted[0] is not _NOBODY]
            others = (piece for identity, pieces in self._noted if identity is _NOBODY for piece in pieces)
            self._index.add(files, (piece for piece in others if piece.times == 1))
        self._forget()

    def _forget(self) -> None:
        self._noted.clear()
        self._noted_pieces = 0

    def renew(self, known: FileIdentity, ctime_ns: int) -> None:
        """Our link has changed the ctime of a file that is as it was in all else."""
        if self._index is not None and known.ctime_ns != ctime_ns:
            self._index.renew([(known, ctime_ns)])


_NOBODY = FileIdentity(0, 0, 0, 0, 0, 0)


def _without_birth(identity: FileIdentity) -> tuple[int, ...]:
    return (identity.filesystem, identity.inode, identity.size, identity.mtime_ns, identity.ctime_ns)
