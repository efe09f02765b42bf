"""The seal: one spool entry becomes one committed bundle, and nothing is left of the entry."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zonebundle.errors import NoSuchBundleError, NotFoundError, SealError, SnapshotError
from zonebundle.host import trace
from zonebundle.host.clock import Clock, SystemClock
from zonebundle.host.files import sync_directory
from zonebundle.model.manifest import Header
from zonebundle.model.metadata import parse_time
from zonebundle.model.paths import path_to_json, printable
from zonebundle.model.quantities import format_size
from zonebundle.model.record import Output
from zonebundle.model.report import Gap, Outcome, Step
from zonebundle.model.zone import ProcessRef
from zonebundle.seal.areas import OpenAreas
from zonebundle.seal.compress import Compression
from zonebundle.seal.entry import Record, SpoolEntry, remove_leftovers
from zonebundle.seal.marks import CrashMarks, were_left
from zonebundle.seal.plan import Plan, PlannedLog, plan
from zonebundle.seal.release import Destroy, Releaser
from zonebundle.seal.report import describe, report_json, trace_json
from zonebundle.seal.workers import Workers
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.draft import BundleDraft
from zonebundle.store.store import Store

# The names of entries that are ours: an output of that name would hide them.
_RESERVED = frozenset({"metadata.toml", "report.json", "trace.json", "manifest.jsonl", "logs"})
_BLOCK = 1 << 20

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
    """Seals the entries of one spool into one store. Its methods block; several threads may seal different bundles."""

    def __init__(
        self,
        spool: Path,
        store_directory: Path,
        destroy: Destroy,
        workers: Workers,
        *,
        agent: ProcessRef | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`destroy` removes an area; `agent` is the process whose death ends this one too (see CrashMarks)."""
        self._spool = spool
        self._store_directory = store_directory
        self._workers = workers
        self._agent = agent
        self._clock = clock or SystemClock()
        self._store: Store | None = None
        self._opening = threading.Lock()
        self._releaser = Releaser(spool, destroy)
        self._has_interrupted = False

    def seal(self, bundle_id: str, progress: Progress, canceled: threading.Event) -> Sealed | None:
        """Make the bundle of a spool entry; None if it was deleted. May be repeated after a crash at any point.

        Raises NotFoundError if there is no such entry, FormatError if its record is damaged; StoreError, SealError,
        OSError if it cannot be done now: then the entry is untouched; SealCanceledError when `canceled` was set.
        """
        begin = self._clock.monotonic()
        trace.point("seal.started")
        entry = SpoolEntry(self._spool, bundle_id)
        if not entry.is_recorded():
            raise NotFoundError(f"the spool has no record of bundle {bundle_id}: it was sealed or removed")
        record = entry.read_record()
        bundle = self._committed(record)
        if bundle is None and not entry.is_sealed():
            self._make(entry, record, progress, canceled)
            bundle = self._committed(record)
        seconds = self._clock.monotonic() - begin
        left = self._clean_up(entry)
        return Sealed(bundle.header, bundle.size, seconds, left) if bundle else None

    def _make(self, entry: SpoolEntry, record: Record, progress: Progress, canceled: threading.Event) -> None:
        """Record → plan → segments → bundle → commit."""
        header = record.header
        created = parse_time(header.metadata.time_created)
        steps = [*record.steps]
        with contextlib.ExitStack() as stack:
            draft = stack.enter_context(BundleDraft(self.store(), header.metadata, created))
            areas = stack.enter_context(OpenAreas(record.areas))
            self._note_interruption(entry)
            marks = stack.enter_context(CrashMarks(entry.path, self._agent))
            with self._step(steps, "plan", created) as step:
                planned = stack.enter_context(plan(entry, record, areas))
                step(f"{len(record.trees)} trees walked in snapshots, about {format_size(planned.bytes)}")
            trace.point("seal.planned")
            draft.add_bytes(b"metadata.toml", header.metadata.to_toml())
            self._add_outputs(draft, entry, record)
            with self._step(steps, "logs", created) as step:
                step(self._add_logs(draft, planned, record, areas, marks, progress, canceled))
            draft.add_bytes(b"report.json", report_json(header, steps, record.gaps))
            draft.add_bytes(b"trace.json", trace_json(header, steps))
            draft.commit(
                hold_seconds=header.hold_seconds, graceful_seconds=header.graceful_seconds, gaps=record.gaps.count
            )

    def _add_outputs(self, draft: BundleDraft, entry: SpoolEntry, record: Record) -> None:
        if not record.outputs:
            return
        descriptor = entry.open_outputs()
        try:
            for output in record.outputs:
                if _is_own_name(output.name):
                    draft.add_bytes(output.name.encode(), _read_output(descriptor, output, record))
                else:
                    record.gaps.add(Gap(repr(output.name), "an output cannot have this name; it is left out"))
        finally:
            os.close(descriptor)

    def _add_logs(
        self,
        draft: BundleDraft,
        planned: Plan,
        record: Record,
        areas: OpenAreas,
        marks: CrashMarks,
        progress: Progress,
        canceled: threading.Event,
    ) -> str:
        files = done = 0

        def advance(length: int) -> None:
            nonlocal done
            done += length
            # The total is only about right: holes are not read, and what the limits cut is known at the end.
            progress(max(planned.bytes, done), done)

        progress(planned.bytes, 0)
        owner = record.header.metadata.bundle_id
        work = Compression(areas, self._workers, self.store().segments, owner, marks, record.gaps, canceled, advance)
        with work.run(planned.logs) as logs:
            for log, pieces in logs:
                draft.add_log(
                    log.path,
                    log.length,
                    mode=log.log.mode & 0o7777,
                    mtime_ns=log.log.mtime_ns,
                    pieces=pieces,
                    origin=_origin(log),
                )
                files += 1
        return f"{files} files, {format_size(done)}"

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
        """Delete a bundle that is in the store, in the spool, or both; returns the bytes freed in the store.

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
        try:
            freed = self.store().delete(zone, bundle_id)
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

    def _committed(self, record: Record) -> StoredBundle | None:
        metadata = record.header.metadata
        try:
            return self.store().find(metadata.zone, metadata.bundle_id)
        except NoSuchBundleError:
            return None

    def settle_kept(self) -> None:
        """End the entries that were kept for followers which have gone since. Raises SnapshotError, OSError."""
        if self._releaser.kept:
            self._releaser.settle_kept()

    def _note_interruption(self, entry: SpoolEntry) -> None:
        # Its segments have no lease any more, and may not be those of the next attempt.
        self._has_interrupted |= were_left(entry.path)

    def sweep(self) -> None:
        """Remove the segments that an interrupted seal left and no bundle uses. Only with nothing left to seal."""
        if self._has_interrupted:
            self.store().sweep()
            self._has_interrupted = False

    def store(self) -> Store:
        """The store, opened when it is first needed: one that cannot be opened now is tried again by each seal."""
        with self._opening:
            if self._store is None:
                self._store = Store.open(self._store_directory)
            return self._store

    def recover(self) -> None:
        """Finish removals that an earlier sealer had begun, in spool and store. Raises StoreError, OSError."""
        remove_leftovers(self._spool)
        self.store()

    def close(self) -> None:
        """Give the store back. Nothing may be on its way."""
        if self._store is not None:
            self._store.close()
            self._store = None


def _is_own_name(name: str) -> bool:
    parts = name.split("/")
    return {"", ".", ".."}.isdisjoint(parts) and "\0" not in name and parts[0] not in _RESERVED


def _read_output(descriptor: int, output: Output, record: Record) -> bytes:
    data = bytearray()
    while len(data) < output.length:
        block = os.pread(descriptor, min(_BLOCK, output.length - len(data)), output.offset + len(data))
        if not block:
            missing = output.length - len(data)
            record.gaps.add(Gap(printable(output.name), f"its last {missing} bytes are missing in the spool"))
            break
        data += block
    return bytes(data)


def _origin(planned: PlannedLog) -> dict[str, Any]:
    log = planned.log
    return path_to_json(os.path.join(os.fsencode(log.host_root), log.host_path)) | {"ino": log.inode}
