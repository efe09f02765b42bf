"""What the sealer does for its stores besides sealing: clean-up, copies, barriers. All of it may be asked for again."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from array import array
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from zonebundle.errors import SilentError, StoreError
from zonebundle.model.ids import decode_zone_name
from zonebundle.model.metadata import Cause, parse_time
from zonebundle.model.record import LIVE, RECORD_FILE
from zonebundle.model.retention import Candidate, Plan, plan_removals
from zonebundle.seal.ahead import Ahead
from zonebundle.seal.entry import SpoolEntry
from zonebundle.seal.storage import Storage
from zonebundle.store.bundle import MANIFEST, load_bundle, segments_in
from zonebundle.store.failure import store_errors
from zonebundle.store.reader import is_bundle_id
from zonebundle.store.store import Store
from zonebundle.store.usage import usage

_log = structlog.get_logger()

# Sealing ahead begins again when so much of the limit is free: or it would fill what the next clean-up has to empty.
_ROOM_FOR_AHEAD = 0.9
_FIRST_PAUSE = 5.0
_LAST_PAUSE = 60.0


class Upkeep:
    """Keeps the stores of one spool in order. Methods block, and may be called from any thread."""

    def __init__(self, spool: Path, storage: Storage, ahead: Ahead, quota: int | None = None) -> None:
        """`quota`: bytes that a store directory may use, instead of what applies to it on disk."""
        self._spool = spool
        self._storage = storage
        self._ahead = ahead
        self._quota = quota
        self._cleaning = threading.Lock()
        self._catching_up = threading.Lock()
        self._up_to_date: frozenset[tuple[Path, int]] = frozenset()
        # What could not be done is tried again, later and later.
        self._pause = _FIRST_PAUSE
        self._not_before = 0.0
        self.has_room_for_ahead = True

    def utilization(self) -> dict[str, dict[str, int]]:
        """Omicron's three numbers of every directory that can be had. Raises StoreError if there is none."""
        with self._storage.stores.working():
            told = {}
            for store in self._storage.usable():
                with _log_silence(store):
                    measured = self._storage.stores.on(store, partial(usage, store.directory, self._quota))
                    told[str(store.directory)] = measured.to_json()
            return told

    def plan_clean_up(self, storage_limit: int, priority: Sequence[str], pinned: Collection[str]) -> list[list[str]]:
        """The bundles, [zone, bundle ID] each, that `clean_up` would remove now. Raises StoreError."""
        with self._cleaning, self._storage.stores.working():
            stores = self._storage.usable()
            doomed: list[list[str]] = []
            for store in stores:
                with _log_silence(store):
                    plan = partial(self._plan_store, store, storage_limit, priority, pinned)
                    doomed += self._storage.stores.on(store, plan)
            return doomed

    def _plan_store(
        self, store: Store, percent: int, priority: Sequence[str], pinned: Collection[str]
    ) -> list[list[str]]:
        used, limit = self._measure(store, percent)
        if used <= limit:
            return []
        plan = self._plan(_Stock(store), used, limit, priority, pinned)
        return [[removal.zone, removal.bundle_id] for removal in plan.removals]

    def clean_up(
        self,
        storage_limit: int,
        priority: Sequence[str],
        pinned: Collection[str],
        among: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Remove what is of lowest priority until no directory uses more than `storage_limit` percent of its quota.

        `pinned` bundles (IDs), and those that are still in the spool, stay; only those of `among` go, if it is given:
        nobody may begin to read them meanwhile. A bundle is removed from every directory. Returns
        {"dirs": {directory: {"bundles": n, "bytes": n}}, "removed": [[zone, bundle ID]]}. Raises StoreError.
        """
        dirs: dict[str, dict[str, int]] = {}
        removed: list[tuple[str, str]] = []
        with self._cleaning, self._storage.stores.working():
            stores = self._storage.usable()
            rooms = []
            for store in stores:
                given_up = threading.Event()
                with _log_silence(store, given_up):
                    work = partial(self._clean_up, store, storage_limit, priority, set(pinned), among, given_up)
                    gone, freed, has_room = self._storage.stores.on(store, work)
                    removed += gone
                    dirs[str(store.directory)] = {"bundles": len(gone), "bytes": freed}
                    rooms.append(has_room)
            self.has_room_for_ahead = all(rooms)
        return {"dirs": dirs, "removed": [list(bundle) for bundle in removed]}

    def _clean_up(
        self,
        store: Store,
        percent: int,
        priority: Sequence[str],
        pinned: set[str],
        among: Collection[str] | None,
        given_up: threading.Event,
    ) -> tuple[list[tuple[str, str]], int, bool]:
        """The bundles removed, the bytes freed, and whether there is room for seal-ahead.

        Once it is `given_up`, because the store did not answer, nothing more goes: somebody may read the bundles.
        """
        before, limit = self._measure(store, percent)
        if before <= limit:
            return [], 0, before <= limit * _ROOM_FOR_AHEAD
        self.has_room_for_ahead = False
        store.sweep()
        stock = _Stock(store)
        used, _ = self._measure(store, percent)
        if among is not None:
            pinned |= {candidate.bundle_id for candidate in stock.candidates} - set(among)
        plan = self._plan(stock, used, limit, priority, pinned)
        if given_up.is_set():
            return [], 0, False
        index = self._storage.index
        for removal in plan.removals:
            _log.info("the clean-up removes a bundle", zone=removal.zone, bundle=removal.bundle_id, why=removal.reason)
        doomed = [(removal.zone, removal.bundle_id) for removal in plan.removals]
        free = stock.digests_of(plan.segments) | stock.freed_by({bundle_id for _, bundle_id in doomed})
        if index is not None:
            index.release_claims(free)
        # Here first: where nothing can be removed (read-only), nothing has to go elsewhere for it.
        store.remove_all(store.bundle_directory(zone, bundle_id) for zone, bundle_id in doomed)
        if given_up.is_set():
            # Nobody was told: they stay elsewhere, and are copied back.
            return [], 0, False
        self._storage.stores.delete_all(doomed)
        store.remove_unreferenced(stock.digests_of(plan.segments))
        after, limit = self._measure(store, percent)
        return doomed, max(0, before - after), after <= limit * _ROOM_FOR_AHEAD

    def _measure(self, store: Store, percent: int) -> tuple[int, int]:
        """What a store uses, and may use: real bytes. Walks all of it.

        What is removed when a hold on its way has ended is not counted: nothing must go for it too.
        """
        measured = usage(store.directory, self._quota)
        return measured.bytes_used - store.segments.aside_bytes(), measured.dataset_quota * percent // 100

    def _plan(self, stock: _Stock, used: int, limit: int, priority: Sequence[str], pinned: Collection[str]) -> Plan:
        index = self._storage.index
        unused = stock.unused(index.claimed_segments() if index is not None else ())
        # After the stock was taken: a bundle in it may have been sealed a moment ago, and not be through.
        kept = {*pinned, *self._spooled()}
        return plan_removals(stock.candidates, stock.sizes(), unused, used, limit, tuple(priority), kept)

    def _spooled(self) -> set[str]:
        return {name for name in os.listdir(self._spool) if is_bundle_id(name)}

    def prune(self) -> int:
        """Remove every segment that nobody uses; returns the bytes freed. Raises StoreError."""
        with self._storage.stores.working():
            return sum(self._storage.stores.on(store, store.sweep) for store in self._storage.usable())

    def repair(self) -> dict[str, Any]:
        """Bring every directory that can be had up to date: what one lacks is copied, what was deleted is deleted."""
        with self._catching_up, self._storage.stores.working():
            self._storage.usable()
            copied, deleted, problems = self._storage.stores.catch_up()
        return {"copied": copied, "deleted": deleted, "problems": problems}

    def catch_up(self) -> bool:
        """What has to be done once: build a new index; bring directories that have come, or come back, up to date.

        Returns whether one of several directories may have brought bundles.
        """
        self._storage.usable()
        there = self._storage.stores.attendance()
        if there <= self._up_to_date or time.monotonic() < self._not_before:
            self._up_to_date &= there
            return False
        if not self._catching_up.acquire(blocking=False):
            return False
        try:
            with self._storage.stores.working():
                self._storage.refresh()
                copied, deleted, problems = self._storage.stores.catch_up()
        finally:
            self._catching_up.release()
        if copied or deleted or problems:
            _log.info("store directories were brought up to date", copied=copied, deleted=deleted, problems=problems)
        if problems:
            self._not_before = time.monotonic() + self._pause
            self._pause = min(self._pause * 2, _LAST_PAUSE)
        else:
            self._up_to_date = there
            self._pause = _FIRST_PAUSE
        return len(self._storage.stores.directories) > 1

    def ahead(self, zones: Sequence[dict[str, Any]], complete: bool, largest: int) -> dict[str, Any]:
        """Seal the rotated logs of zones that run, unless what is sealed fills the store already (see Ahead.run)."""
        return self._ahead.run(zones, complete, largest, lambda: self.has_room_for_ahead)

    def stop(self) -> None:
        """End what would go on for long."""
        self._ahead.stop()

    def drain(self, path: str) -> None:
        """Begin nothing any more that would use a store directory at or below `path`."""
        self._storage.stores.drain(path)

    def undrain(self, path: str) -> None:
        """Use it again."""
        self._storage.stores.undrain(path)

    def uses(self, path: str) -> list[str]:
        """What of ours uses `path` now, a line each: bundles whose logs are still to be read there, and stores."""
        found = [f"a store directory below {path}"] if self._storage.stores.is_in_use(path) else []
        if self._ahead.reads(path):
            found.append(f"rotated logs below {path}, which are sealed ahead")
        for name in sorted(self._spooled()):
            entry = SpoolEntry(self._spool, name)
            if entry.is_recorded():
                places = [
                    place
                    for place in _places(entry.path / RECORD_FILE)
                    if Path(os.path.realpath(place)).is_relative_to(path)
                ]
                if places:
                    found.append(f"bundle {name}, which is not sealed yet, reads from {places[0]}")
        return found


@contextlib.contextmanager
def _log_silence(store: Store, given_up: threading.Event | None = None) -> Iterator[None]:
    """What cannot be done in a directory that does not answer must not keep it from the others."""
    try:
        yield
    except SilentError as error:
        if given_up is not None:
            given_up.set()
        _log.warning("a store directory is left out", directory=str(store.directory), reason=str(error))


class _Stock:
    """The bundles and segments of one store in numbers, for the plan of a clean-up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._numbers: dict[str, int] = {}
        self.candidates: list[Candidate] = []
        for directory in store.directories():
            if (candidate := self._candidate(directory)) is not None:
                self.candidates.append(candidate)

    def _candidate(self, directory: Path) -> Candidate | None:
        try:
            segments = array("L", sorted({self._number(digest) for digest in segments_in(directory / MANIFEST)}))
            with os.scandir(directory) as files:
                own = sum(file.stat().st_blocks * 512 for file in files)
            created = os.stat(directory).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            # A draft, deleted meanwhile, or nothing of ours.
            return None
        zone, cause = decode_zone_name(directory.parent.name), Cause.OTHER
        try:
            bundle = load_bundle(directory, self._store.segments)
        except StoreError:
            # Debris counts, and goes first.
            return Candidate(directory.name, zone, cause, created, own, segments)
        if bundle is None:
            return None
        metadata = bundle.header.metadata
        try:
            created = parse_time(metadata.time_created)
        except ValueError:
            _log.warning("a bundle has no time that can be read", directory=str(directory))
        return Candidate(metadata.bundle_id, metadata.zone, metadata.cause, created, own, segments)

    def _number(self, digest: str) -> int:
        return self._numbers.setdefault(digest, len(self._numbers))

    def unused(self, claimed: Iterator[str] | Collection[str]) -> list[int]:
        """The numbers of those segments that no bundle uses."""
        first = len(self._numbers)
        numbers = {self._number(digest) for digest in claimed}
        return sorted(number for number in numbers if number >= first)

    def sizes(self) -> dict[int, int]:
        """The bytes on disk of each segment."""
        sizes = {}
        for digest, number in self._numbers.items():
            try:
                sizes[number] = os.stat(self._store.segments.path(digest)).st_blocks * 512
            except FileNotFoundError:
                sizes[number] = 0
        return sizes

    def digests_of(self, numbers: Collection[int]) -> set[str]:
        wanted = set(numbers)
        return {digest for digest, number in self._numbers.items() if number in wanted}

    def freed_by(self, bundle_ids: Collection[str]) -> set[str]:
        """The segments that only these bundles use."""
        gone: set[int] = set()
        kept: set[int] = set()
        for candidate in self.candidates:
            (gone if candidate.bundle_id in bundle_ids else kept).update(candidate.segments)
        return self.digests_of(gone - kept)


def _places(record: Path) -> Iterator[str]:
    """The directories that a seal will read: areas, and logs that were left at their place."""
    with store_errors(f"reading {record}"):
        try:
            file = record.open("rb")
        except FileNotFoundError:
            return
        with file:
            for line in file:
                if line.startswith((b'{"area":', b'{"tree":')) or b',"live",' in line:
                    yield from _places_in(line)


def _places_in(line: bytes) -> Iterator[str]:
    try:
        data = json.loads(line)
    except ValueError:
        # Told where the record is sealed.
        return
    match data:
        case {"area": {"path": str(path)}}:
            yield path
        case {"tree": {"area": area, "host_root": str(path)}} if area == LIVE:
            yield path
        case {"file": {"host_root": str(path)}}:
            yield path
