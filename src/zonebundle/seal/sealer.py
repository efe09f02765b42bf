"""The seal: one spool entry becomes one committed bundle, and nothing is left of the entry."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from zonebundle.errors import (
    FormatError,
    FullError,
    NoSuchBundleError,
    NotFoundError,
    SealCanceledError,
    SealError,
    SilentError,
    SnapshotError,
    StoreError,
)
from zonebundle.host import trace
from zonebundle.host.clock import Clock, SystemClock
from zonebundle.host.files import sync_directory
from zonebundle.model.identity import TRUSTED_AGE_NS
from zonebundle.model.manifest import Header
from zonebundle.model.metadata import Metadata, parse_time
from zonebundle.model.quantities import format_size
from zonebundle.model.record import RECORD_FILE, Area
from zonebundle.model.report import Outcome, Step
from zonebundle.model.zone import ProcessRef
from zonebundle.seal.areas import OpenAreas
from zonebundle.seal.attempt import Attempt
from zonebundle.seal.compress import Compression
from zonebundle.seal.entry import Record, SpoolEntry, remove_leftovers
from zonebundle.seal.known import Known
from zonebundle.seal.marks import CrashMarks, forget_marks, were_left
from zonebundle.seal.outputs import add_outputs
from zonebundle.seal.plan import Plan, plan
from zonebundle.seal.release import Releaser
from zonebundle.seal.renew import renewer
from zonebundle.seal.report import describe, report_json, trace_json
from zonebundle.seal.storage import Storage
from zonebundle.seal.workers import Workers
from zonebundle.snapshots.areas import Unlinked
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.draft import BundleDraft, Origin
from zonebundle.store.store import Store

# In seconds: the stamps of a file may be this much coarser than its changes, and a little more.
_SETTLED = TRUSTED_AGE_NS / 1e9 + 0.005
# A bundle for which there was no space so often is cut: before, a deletion or a clean-up may be on its way.
_FULL_TO_CUT = 3

Destroy = Callable[[Area, Unlinked | None], None]
Progress = Callable[[int, int], None]
"""Is told how many bytes there are in all, and how many are done."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A bundle that is in the store. `size` is the bytes of its tar.gz, `seconds` how long it took to its commit.

    `left` tells why something of its spool entry could not be removed yet; empty if nothing is left.
    """

    header: Header
    size: int
    seconds: float
    left: str = ""


class Sealer:
    """Seals the entries of one spool into its stores. Its methods block; several threads may seal different bundles."""

    def __init__(
        self,
        spool: Path,
        storage: Storage,
        destroy: Destroy,
        workers: Workers,
        *,
        agent: ProcessRef | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`destroy` removes an area; `agent` is the process whose death ends this one too (see CrashMarks)."""
        self._spool = spool
        self._storage = storage
        self._workers = workers
        self._agent = agent
        self._clock = clock or SystemClock()
        self._releaser = Releaser(spool, lambda area: destroy(area, renewer(storage.index, area)))
        # How often there was no space for a bundle.
        self._full: Counter[str] = Counter()

    def seal(
        self,
        bundle_id: str,
        progress: Progress,
        canceled: threading.Event,
        committed: Callable[[Sealed], None] = lambda _: None,
    ) -> Sealed | None:
        """Make the bundle of a spool entry; None if it was deleted. May be repeated after a crash at any point.

        `committed` is told, once or twice, when one store has the bundle; copies are made after that. Raises
        NotFoundError if there is no such entry, FormatError if its record is damaged; StoreError, SealError, OSError if
        it cannot be done now: then the entry is untouched; SealCanceledError when `canceled` was set.
        """
        begin = self._clock.monotonic()
        trace.point("seal.started")
        entry = SpoolEntry(self._spool, bundle_id)
        if not entry.is_recorded():
            raise NotFoundError(f"the spool has no record of bundle {bundle_id}: it was sealed or removed")
        metadata = entry.read_header().metadata
        with self._storage.stores.working():
            bundle = self._committed(metadata)
            if bundle is None and not entry.is_sealed():
                self._make_somewhere(entry, progress, canceled)
                bundle = self._committed(metadata)
            if bundle is None:
                self._clean_up(entry)
                return None
            sealed = Sealed(bundle.header, bundle.size, self._clock.monotonic() - begin)
            left = ""
            if len(self._storage.stores.directories) > 1:
                # A directory may be slow. The entry stays until every one that can be had has the bundle.
                committed(sealed)
                left = self._storage.stores.copy(bundle)
                if not left:
                    # If we die when its areas have gone, and the store that has the bundle is away at the next start,
                    # it must not be sealed once more, from nothing. A full disk must not keep the entry, though. With
                    # one directory there is no other that the next start could seal into.
                    with contextlib.suppress(OSError):
                        entry.mark_sealed()
            left = left or self._clean_up(entry)
            committed(sealed)
        return replace(sealed, left=left)

    def _make_somewhere(self, entry: SpoolEntry, progress: Progress, canceled: threading.Event) -> None:
        """Make the bundle in the first store in which that works. Raises what the last one raised."""
        stores = self._storage.usable()
        attempts = [(store, False) for store in stores]
        if self._full[entry.bundle_id] >= _FULL_TO_CUT:
            # Only where it fits nowhere as a whole.
            attempts += [(store, True) for store in stores]
        for number, (store, may_cut) in enumerate(attempts, start=1):
            try:
                self._make_there(store, entry, progress, canceled, may_cut=may_cut)
                self._full.pop(entry.bundle_id, None)
                return
            except StoreError as error:
                if isinstance(error, FormatError):
                    # Of the record, which is the same for every store.
                    raise
                if number == len(attempts):
                    self._full[entry.bundle_id] += isinstance(error, FullError)
                    raise
                self._storage.stores.give_up(store, error)

    def _make_there(
        self, store: Store, entry: SpoolEntry, progress: Progress, canceled: threading.Event, *, may_cut: bool
    ) -> None:
        attempt = Attempt(canceled)
        try:
            self._storage.stores.on(store, lambda: self._make(store, entry, progress, attempt, may_cut=may_cut))
        except SilentError:
            # It ends by itself when the store answers again.
            attempt.set()
            forget_marks(entry.path)
            raise

    def _make(self, store: Store, entry: SpoolEntry, progress: Progress, attempt: Attempt, *, may_cut: bool) -> None:
        record = entry.read_record()
        try:
            self._make_bundle(store, entry, record, progress, attempt, may_cut=may_cut)
        except (SealError, OSError) as error:
            if record.is_intact or isinstance(error, SealCanceledError):
                raise
            raise FormatError(
                f"{entry.path} has changed on the disk since it was written, and cannot be sealed: {describe(error)}; "
                "restore it, or delete the bundle"
            ) from error
        finally:
            if may_cut:
                store.refill_reserve()

    def _make_bundle(
        self,
        store: Store,
        entry: SpoolEntry,
        record: Record,
        progress: Progress,
        attempt: Attempt,
        *,
        may_cut: bool,
    ) -> None:
        """Record → plan → segments → bundle → commit."""
        header = record.header
        created = parse_time(header.metadata.time_created)
        steps = [*record.steps]
        with contextlib.ExitStack() as stack:
            draft = stack.enter_context(BundleDraft(store, header.metadata, created))
            attempt.check()
            areas = stack.enter_context(OpenAreas(record.areas))
            self._note_interruption(entry)
            marks = stack.enter_context(CrashMarks(entry.path, self._agent))
            self._let_settle(entry)
            with self._step(steps, "plan", created) as step:
                planned = stack.enter_context(plan(entry, record, areas))
                step(f"{len(record.trees)} trees walked in snapshots, about {format_size(planned.bytes)}")
            trace.point("seal.planned")
            draft.add_bytes(b"metadata.toml", header.metadata.to_toml())
            add_outputs(draft, entry, record)
            known = Known(self._storage.index, store, entry.bundle_id, self._storage.stores.all())
            work = Compression(
                areas,
                self._storage.workers_for(store, self._workers),
                store.segments,
                entry.bundle_id,
                known,
                marks,
                record.gaps,
                attempt,
                _Counted(planned.bytes, progress),
                may_cut=may_cut,
            )
            with self._step(steps, "logs", created) as step:
                step(_add_logs(draft, planned, work))
            if work.is_cut:
                # What did not fit must not keep the rest from being committed.
                with contextlib.suppress(StoreError):
                    store.segments.flush()
                store.segments.release_missing(entry.bundle_id)
                store.spend_reserve()
            draft.add_bytes(b"report.json", report_json(header, steps, record.gaps))
            draft.add_bytes(b"trace.json", trace_json(header, steps))
            draft.commit(
                hold_seconds=header.hold_seconds,
                graceful_seconds=header.graceful_seconds,
                gaps=record.gaps.count,
                check=attempt.check,
                committed=known.keep,
            )
            if work.is_cut:
                store.sweep()

    def _let_settle(self, entry: SpoolEntry) -> None:
        # A log that was linked a moment ago has stamps that prove nothing yet; what is read of it could not be known.
        age = self._clock.now() - (entry.path / RECORD_FILE).stat().st_mtime
        if 0 <= age < _SETTLED:
            time.sleep(_SETTLED - age)

    @contextlib.contextmanager
    def _step(self, steps: list[Step], name: str, created: float) -> Iterator[Callable[[str], None]]:
        """Note a step of the seal; the body tells its detail. Its failure is the seal's, so it is not noted here."""
        # The hold's own clock is not known any more; the bundle was created when the hold began, to a millisecond.
        start = max(0.0, self._clock.now() - created)
        begin = self._clock.monotonic()
        details: list[str] = []
        yield details.append
        seconds = self._clock.monotonic() - begin
        steps.append(Step(name, Outcome.SUCCESS, start, seconds, "; ".join(details), lane="seal"))

    def delete(self, zone: str, bundle_id: str) -> int:
        """Delete a bundle that is in a store, in the spool, or both; returns the bytes freed in the stores.

        Its seal must have been ended before. Raises NoSuchBundleError if it is in neither, StoreError, OSError.
        """
        entry = SpoolEntry(self._spool, bundle_id)
        was_spooled = entry.is_recorded() and not entry.is_sealed()
        if was_spooled:
            self._note_interruption(entry)
            # Durable before the store forgets the bundle: the record must not bring it back after a crash.
            entry.mark_sealed()
        else:
            sync_directory(self._spool)
        freed = 0
        self._storage.usable()
        with self._storage.stores.working():
            try:
                freed = self._storage.stores.delete(zone, bundle_id)
            except NoSuchBundleError:
                if not was_spooled:
                    raise
        if entry.is_recorded():
            self._clean_up(entry)
        return freed

    def _clean_up(self, entry: SpoolEntry) -> str:
        """Destroy the areas that nobody else uses and remove the entry; returns why something is left."""
        try:
            self._releaser.release(entry)
        except (SealError, SnapshotError, OSError) as error:
            return describe(error)
        return ""

    def _committed(self, metadata: Metadata) -> StoredBundle | None:
        try:
            self._storage.usable()
            return self._storage.stores.find(metadata.zone, metadata.bundle_id)
        except NoSuchBundleError:
            return None

    def settle(self) -> None:
        """End what had to wait for others: entries kept for followers, segments that a hold may have needed.

        Raises SnapshotError, StoreError, OSError.
        """
        if self._releaser.kept:
            self._releaser.settle_kept()
        with self._storage.stores.working():
            for store in self._storage.stores.all():
                if store.pruner.is_waiting:
                    self._storage.stores.on(store, store.pruner.finish)

    def _note_interruption(self, entry: SpoolEntry) -> None:
        # Its segments have no lease any more, and may not be those of the next attempt.
        if were_left(entry.path):
            self._storage.interrupted.make()

    def sweep(self) -> None:
        """Remove the segments that an interrupted seal left and no bundle uses. Only with nothing left to seal."""
        if self._storage.interrupted.is_there:
            with self._storage.stores.working():
                for store in self._storage.usable():
                    self._storage.stores.on(store, store.sweep)
            self._storage.interrupted.remove()

    def recover(self) -> None:
        """Finish removals that an earlier sealer had begun, in spool and stores. Raises StoreError, OSError."""
        remove_leftovers(self._spool)
        self._storage.usable()

    @property
    def is_indexed(self) -> bool:
        """Whether there is an index, which was made for these stores."""
        index = self._storage.index
        return index is not None and not index.is_broken

    def close(self) -> None:
        """Give the stores back. Nothing may be on its way."""
        self._storage.close()


class _Counted:
    """Adds up what is done of `total` bytes, which is only about right: holes are not read, limits cut."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total = total
        self._progress = progress
        self.done = 0
        progress(total, 0)

    def __call__(self, length: int) -> None:
        self.done += length
        self._progress(max(self._total, self.done), self.done)


def _add_logs(draft: BundleDraft, planned: Plan, work: Compression) -> str:
    files = done = 0
    with work.run(planned.logs) as logs:
        for log, pieces in logs:
            draft.add_log(
                log.path,
                log.length,
                mode=log.log.mode & 0o7777,
                mtime_ns=log.log.mtime_ns,
                pieces=pieces,
                origin=Origin(log.log.host_root, log.log.host_path, log.log.inode),
            )
            files += 1
            done += log.length
    return f"{files} files, {format_size(done)}"
