"""Where bundles go: the store directories, and the index of what they hold."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import structlog

from zonebundle.errors import NoSuchBundleError, SilentError, StoreError
from zonebundle.model.manifest import Piece
from zonebundle.seal.guard import SpoolGuard
from zonebundle.seal.workers import Workers
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.failure import store_errors
from zonebundle.store.index import Index
from zonebundle.store.reader import read_format
from zonebundle.store.store import Store
from zonebundle.store.stores import Stores

_log = structlog.get_logger()

INDEX = "index.sqlite"
SPOOL = "spool"
_STRAYS = "strays"
_INTERRUPTED = "interrupted"


class Note:
    """Something to be remembered over crashes: a file that is there, or not."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def is_there(self) -> bool:
        return self._path.exists()

    def make(self) -> None:
        """Remember it. Raises StoreError."""
        with store_errors(f"making {self._path}"):
            self._path.touch(mode=0o600)

    def remove(self) -> None:
        """Forget it. Raises StoreError."""
        with store_errors(f"removing {self._path}"):
            self._path.unlink(missing_ok=True)


class Storage:
    """The stores and the index of one state directory. Methods may be called from any thread."""

    def __init__(self, state_dir: Path, directories: Sequence[Path]) -> None:
        self.stores = Stores(directories, state_dir, SpoolGuard(state_dir / SPOOL, lambda: self.index))
        self.state_dir = state_dir
        self._path = state_dir / INDEX
        # Segments may be in the stores that nobody uses or claims, and that only a sweep would find: of what was sealed
        # ahead, to be swept when all is claimed again that can be; of interrupted seals, when nothing is to be sealed.
        self.strays = Note(state_dir / _STRAYS)
        self.interrupted = Note(state_dir / _INTERRUPTED)
        self._opening = threading.Lock()
        self.index: Index | None = None

    def usable(self) -> list[Store]:
        """The stores that can be had, opened when they are first needed. Raises StoreError if there is none."""
        with self._opening:
            if self.index is None:
                # Before the first store: its recovery removes segments, which the index must forget.
                self._open_index()
        return self.stores.usable()

    def _open_index(self) -> None:
        known = []
        failure: StoreError | None = None
        for directory in self.stores.directories:
            if self.stores.is_drained(directory):
                continue
            try:
                if (store_id := self.stores.at(directory, partial(read_format, directory))) is not None:
                    known.append(store_id)
            except StoreError as error:
                failure = failure or error
        if not known:
            # Without any store nobody can tell whether the index is of this one.
            places = ", ".join(map(str, self.stores.directories))
            raise failure or StoreError(f"there is no store in {places}, or it is being drained")
        index = Index.open(self._path, known)
        if index.is_fresh:
            # The claims are gone with the old one. Not being able to note that must not keep a bundle from its seal.
            with contextlib.suppress(StoreError):
                self.strays.make()
        self.index = index

    def refresh(self) -> None:
        """If the index was made anew, tell it what the bundles hold."""
        index = self.index
        if index is None or not index.is_fresh:
            return
        index.rebuild(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        seen: set[str] = set()
        for store in self.stores.all():
            try:
                for bundle in self.stores.each(store, store.stored):
                    if (bundle_id := bundle.header.metadata.bundle_id) not in seen:
                        seen.add(bundle_id)
                        yield from self.stores.each(store, partial(_pieces_of, bundle))
            except SilentError as error:
                _log.warning("not all pieces are known", reason=str(error))

    def workers_for(self, store: Store, workers: Workers) -> Workers:
        """The threads that write to a store: where there are several, none may take them along when it hangs."""
        return workers.apart(store.directory) if len(self.stores.directories) > 1 else workers

    def close(self) -> None:
        """Give everything back. Nothing may be on its way."""
        self.stores.close()
        if self.index is not None:
            self.index.close()
            self.index = None


def _pieces_of(bundle: StoredBundle) -> Iterator[Piece]:
    try:
        for entry in bundle.entries():
            yield from (piece for piece in entry.pieces if piece.times == 1)
    except (StoreError, NoSuchBundleError) as error:
        # Damaged, or deleted meanwhile: the others are worth knowing all the same.
        _log.warning("a bundle's pieces are not known", bundle=str(bundle.directory), reason=str(error))
