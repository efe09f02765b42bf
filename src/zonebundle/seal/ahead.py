"""Seal-ahead: the rotated logs of zones that run become segments before any bundle needs them.

At the stop only what is new is left to be sealed. The segments are claimed for the zone as long as it has the files;
with a file, or its zone, they go, unless a bundle has come to use them. Nothing waits for this, and it gives way to all
else: it is off while the store is near its limit, and waits while the host is busy.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from zonebundle.errors import FullError, StoreError
from zonebundle.host.files import make_private_directory, remove_tree
from zonebundle.host.pressure import read_pressure
from zonebundle.model.record import Limits
from zonebundle.model.zone import LogTree, ProcessRef
from zonebundle.seal.batch import Batch
from zonebundle.seal.marks import CrashMarks
from zonebundle.seal.rotated import RotatedLogs
from zonebundle.seal.storage import SPOOL, Storage
from zonebundle.seal.workers import Workers
from zonebundle.store.failure import store_errors
from zonebundle.store.index import Index
from zonebundle.store.reader import is_bundle_id
from zonebundle.store.store import Store

_log = structlog.get_logger()

# In `<state-dir>`: which log was worked on, should that crash the sealer.
_MARKS = "ahead"
# Every so many runs all directories are looked into: a file that is written to in its place leaves no mark on its own.
_RUNS_TO_LOOK_AGAIN = 20
# Of one zone; what is beyond is left to its seals.
_FILES_OF_A_ZONE = 100_000
# In percent of the last ten seconds.
_BUSY = 40.0
_PRESSURE_AGE = 1.0
_PRESSURES = ("io", "cpu")
_FULL = "full"
_STOPPED = "stopped"


class _EndedError(Exception):
    """The run ends here, for the reason given, with what it has done."""


def host_pressure() -> float:
    """How much the host waits for its disks or processors (see host.pressure)."""
    return max(map(read_pressure, _PRESSURES))


class Ahead:
    """Seals rotated logs ahead, a run at a time. Its methods may be called from any thread; `run` blocks."""

    def __init__(
        self,
        storage: Storage,
        workers: Workers,
        *,
        agent: ProcessRef | None = None,
        pressure: Callable[[], float] = host_pressure,
    ) -> None:
        """`agent` is the process whose death ends this one too (see CrashMarks)."""
        self._storage = storage
        self._workers = workers
        self._agent = agent
        self._pressure = pressure
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._has_room: Callable[[], bool] = lambda: True
        self._runs = 0
        # By zone, what was found in its log trees.
        self._zones: dict[str, dict[LogTree, RotatedLogs]] = {}
        # The zones that may have claims; None: nobody knows.
        self._claimants: frozenset[str] | None = None
        self._next_look = 0.0
        self._was_full = False
        self._store: Store | None = None
        # The directory below which a run reads now, None between trees.
        self._place: Path | None = None
        self._has_noted_strays = False

    def reads(self, path: str) -> bool:
        """Whether a run is reading a log tree at or below `path` now."""
        place = self._place
        return place is not None and place.is_relative_to(path)

    def stop(self) -> None:
        """End the run that goes on, soon, and begin no other."""
        self._stopping.set()

    def run(
        self,
        zones: Sequence[dict[str, Any]],
        complete: bool,
        largest: int = Limits().file,
        has_room: Callable[[], bool] = lambda: True,
    ) -> dict[str, Any]:
        """Seal what is new in `zones`, [{"name", "is_running", "trees"}], and remove what was made for what is gone.

        `complete` says that there are no other zones. Files of more than `largest` bytes are left to the seals. Once
        `has_room` is False, the run ends. Returns {"files", "bytes", "known", "freed"}, with "ended" and the reason if
        not all was done; {"busy": true} while another run goes on. Raises StoreError.
        """
        if not self._turn.acquire(blocking=False):
            return {"busy": True}
        try:
            self._has_room = has_room
            if not has_room():
                self._look_again()
                return {"ended": _FULL}
            return self._run(zones, complete, largest)
        finally:
            self._place = self._store = None
            self._turn.release()

    def _look_again(self) -> None:
        for trees in self._zones.values():
            for logs in trees.values():
                logs.forget()

    def _run(self, zones: Sequence[dict[str, Any]], complete: bool, largest: int) -> dict[str, Any]:
        stores = self._storage.stores
        with contextlib.ExitStack() as stack:
            with stores.working():
                store = self._store = self._storage.usable()[0]
                # This may last, or hang, and keeps no other store from being given back.
                stack.enter_context(stores.using(store))
            index = self._storage.index
            if index is None or index.is_broken or index.is_fresh:
                # Nobody would find the segments, or those that are there are not known yet.
                return {"ended": "the index is not ready"}
            had_strays, self._has_noted_strays = self._storage.strays.is_there, False
            self._runs += 1
            if self._runs % _RUNS_TO_LOOK_AGAIN == 0:
                self._look_again()
                self._claimants = None
            marks = self._storage.state_dir / _MARKS
            with store_errors(f"making {marks}"):
                make_private_directory(marks)
            with CrashMarks(marks, self._agent) as crashes:
                workers = self._storage.workers_for(store, self._workers)
                batch = Batch(store, index, workers, crashes, self._pace, largest)
                ended = self._seal_all(zones, batch, store)
            if not ended:
                # All was dealt with: what crashed an earlier sealer is no suspect any more.
                remove_tree(marks)
            freed = self._remove(self._end_claims(index, zones, complete) | batch.unneeded)
            if not had_strays or (complete and not ended):
                freed += self._remove_strays(had_strays)
        told = {"files": batch.files, "bytes": batch.bytes, "known": batch.known, "freed": freed}
        if batch.files or freed:
            _log.info("rotated logs were sealed ahead", **told)
        return told | ({"ended": ended} if ended else {})

    def _seal_all(self, zones: Sequence[dict[str, Any]], batch: Batch, store: Store) -> str:
        """Returns why it did not come to the end."""
        ended = ""
        try:
            try:
                for zone in zones:
                    if zone["is_running"]:
                        self._seal_zone(zone["name"], zone["trees"], batch)
            except _EndedError as reason:
                ended = str(reason)
            batch.commit()
        except StoreError as error:
            batch.abandon()
            self._look_again()
            self._storage.stores.give_up(store, error)
            if not isinstance(error, FullError):
                self._remove_quietly(batch.unneeded)
                raise
            if not self._was_full:
                _log.warning("nothing is sealed ahead until the store has space again", reason=str(error))
            self._was_full = True
            return _FULL
        self._was_full = False
        return ended

    def _seal_zone(self, name: str, trees: Sequence[dict[str, Any]], batch: Batch) -> None:
        before = self._zones.get(name, {})
        # Inside another mount namespace there is nothing to be seen from here.
        wanted = [tree for tree in map(LogTree.from_json, trees) if tree.via is None]
        logs = self._zones[name] = {tree: before.get(tree) or RotatedLogs(tree) for tree in wanted}
        if self._claimants is not None:
            self._claimants |= {name}
        room = _FILES_OF_A_ZONE
        for found in logs.values():
            if self._storage.stores.is_drained(found.place):
                found.is_complete = False
                continue
            self._place = found.place
            with contextlib.closing(found.look(room)) as rotated:
                for log in rotated:
                    self._note_strays()
                    if not batch.take(name, log):
                        log.directory.has_left = True
                    self._pace()
            self._place = None
            # A tree that was left out of the configuration leaves claims as files do that are gone.
            found.has_changed |= before.keys() != logs.keys()
            room -= found.count
        # A pack of several zones would stay until the last of them is gone.
        batch.close_pack()

    def _pace(self) -> None:
        """Before each step: wait while the host is busy; raises _EndedError when the run has to end."""
        while True:
            if self._stopping.is_set():
                raise _EndedError(_STOPPED)
            if not self._has_room():
                raise _EndedError(_FULL)
            if time.monotonic() < self._next_look:
                return
            for path in (self._place, self._store.directory if self._store is not None else None):
                if path is not None and self._storage.stores.is_drained(path):
                    raise _EndedError(f"{path} is being drained")
            if self._pressure() <= _BUSY:
                self._next_look = time.monotonic() + _PRESSURE_AGE
                return
            self._stopping.wait(_PRESSURE_AGE)

    def _end_claims(self, index: Index, zones: Sequence[dict[str, Any]], complete: bool) -> set[str]:
        """End the claims of what is gone; returns the segments that nobody claims any more."""
        free: set[str] = set()
        for name in [zone["name"] for zone in zones if zone["is_running"]]:
            trees = self._zones.get(name, {}).values()
            is_complete = all(logs.is_complete for logs in trees)
            if is_complete and any(logs.has_changed for logs in trees):
                self._note_strays()
                free |= index.end_claims(name, {file for logs in trees for file in logs.files()})
        if complete:
            named = frozenset(zone["name"] for zone in zones)
            if self._claimants is None or self._claimants - named:
                self._note_strays()
                free |= index.end_zones(named)
                self._claimants = named
            for name in self._zones.keys() - named:
                del self._zones[name]
        return free

    def _note_strays(self) -> None:
        """Before the first change of a run: were it interrupted, segments would be left that nobody knows of."""
        if not self._has_noted_strays:
            self._storage.strays.make()
            self._has_noted_strays = True

    def _remove(self, segments: set[str]) -> int:
        """Remove what is used by nobody, from every store; returns the bytes freed."""
        if not segments:
            return 0
        return self._in_all(lambda store: store.remove_unreferenced(segments))

    def _in_all(self, remove: Callable[[Store], int]) -> int:
        stores = self._storage.stores
        with stores.working():
            return sum(stores.on(store, partial(remove, store)) for store in stores.all())

    def _remove_quietly(self, segments: set[str]) -> None:
        try:
            self._remove(segments)
        except StoreError as error:
            _log.warning("segments are left that nobody uses", reason=str(error))

    def _remove_strays(self, had_strays: bool) -> int:
        """At the end of a run that has claimed all there is to claim. What an interrupted run left has to be swept."""
        freed = 0
        if had_strays:
            if any(map(is_bundle_id, os.listdir(self._storage.state_dir / SPOOL))):
                # What an interrupted seal has made, it can use when it is tried again.
                return 0
            freed = self._in_all(Store.sweep)
        if had_strays or self._has_noted_strays:
            self._storage.strays.remove()
        return freed
