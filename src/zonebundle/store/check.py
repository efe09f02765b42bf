"""Checking a store dir in every byte, and mending it from the others.

A check only reads. A repair is the writer's, and never writes into a file that is there: it writes a new one, makes it
durable and renames it. Both may go on for hours, so both yield what they find as they find it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from zonebundle.errors import ConflictError, NoSuchBundleError, StoreError
from zonebundle.host import trace
from zonebundle.host.files import sync_directory, write_all
from zonebundle.store.bundle import FRAME, MANIFEST, StoredBundle, segments_in
from zonebundle.store.check_bundle import find_faults
from zonebundle.store.check_dir import Progress, StoreCheck, identify, is_committed
from zonebundle.store.failure import store_errors
from zonebundle.store.problem import Kind, Problem, Repaired, problem
from zonebundle.store.reader import SEGMENTS, StoreReader
from zonebundle.store.replicate import copy_file, copy_with, fetch_segments, has_same_bytes, read_segment
from zonebundle.store.store import Store
from zonebundle.store.tombstones import Tombstones

__all__ = ["Kind", "Problem", "Progress", "Repaired", "check_store", "repair"]

# Among the writer's temporary files, which its next start removes.
_DRAFT = "tmp/repair"
_FILES = frozenset({Kind.MANIFEST, Kind.FRAME})


def check_store(reader: StoreReader, *, deep: bool = False, progress: Progress | None = None) -> Iterator[Problem]:
    """Read a store dir in every byte and yield what is wrong; with `deep`, inflate every piece too.

    In bounded memory: some 20 bytes a segment. Changes nothing, takes no lock, and may run beside an agent. Raises
    StoreError if a directory cannot be listed.
    """
    with StoreCheck(reader, deep=deep, progress=progress) as check:
        yield from check.segments()
        yield from check.bundles()
        yield from check.debris()
        yield from check.unused()


def repair(
    damaged: Store,
    others: Sequence[StoreReader],
    tombstones: Tombstones,
    *,
    deep: bool = False,
    progress: Progress | None = None,
) -> Iterator[Repaired | Problem]:
    """Check a store dir, and bring what it lacks or has damaged from those of `others` that have it whole.

    Bundles with a tombstone are deleted instead. What cannot be mended is yielded as the problem that it stays. No
    bundle may be sealed into, or copied to, this dir by others meanwhile. Raises StoreError if a directory cannot be
    listed, or a bundle with a tombstone not be deleted.
    """
    with StoreCheck(damaged, deep=deep, progress=progress) as check:
        yield from _Repair(damaged, others, tombstones, check).run()


class _Repair:
    def __init__(self, store: Store, others: Sequence[StoreReader], tombstones: Tombstones, check: StoreCheck) -> None:
        self._store = store
        self._others = others
        self._sources = [other.segments for other in others]
        self._tombstones = tombstones
        self._check = check

    def run(self) -> Iterator[Repaired | Problem]:
        yield from self._delete(self._tombstones.all())
        for found in self._check.segments():
            yield self._mend_segment(found) if found.kind == Kind.SEGMENT else found
        for directory in self._check.committed():
            yield from self._mend_bundle(directory)
        yield from self._check.debris()
        yield from self._bring_absent()

    def _delete(self, buried: Collection[str]) -> Iterator[Repaired]:
        for directory in self._check.committed():
            if directory.name in buried and self._is_deleted(directory):
                yield Repaired(directory, "had been deleted, and is deleted here too", identify(directory))

    def _is_deleted(self, directory: Path) -> bool:
        with contextlib.suppress(NoSuchBundleError):
            self._store.delete(*identify(directory))
            return True
        return False

    def _mend_segment(self, found: Problem) -> Repaired | Problem:
        digest = found.path.stem
        owner = f"repair of {digest}"
        draft = self._draft()
        try:
            data = read_segment(digest, self._sources)
            # Nobody may remove the name while another file gets it.
            self._store.segments.lease(owner, (digest,))
            with store_errors(f"writing {draft}"):
                descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    write_all(descriptor, data)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            _put_in_place(draft, found.path)
        except StoreError as error:
            return _unmended(found, error)
        finally:
            self._store.segments.release(owner)
            _forget(draft)
        trace.point("repair.segment-replaced")
        self._check.table.replaced(digest, len(data))
        return Repaired(found.path, "was damaged, and is replaced")

    def _mend_bundle(self, directory: Path) -> Iterator[Repaired | Problem]:
        problems = self._check.bundle(directory)
        try:
            is_changed = self._restore(directory, {found.kind for found in problems})
        except (StoreError, NoSuchBundleError) as error:
            # Without a problem of its own it is the other dir's frame that it should have got.
            problems = problems or [
                problem(Kind.FRAME, directory / FRAME, "differs from another dir's", identify(directory))
            ]
            yield from (_unmended(found, error) for found in problems)
            return
        if not is_changed:
            yield from problems
        elif left := [found for found in self._check.bundle(directory) if found.is_damage]:
            yield from left
        else:
            yield Repaired(directory, "was damaged, and is whole again", identify(directory))

    def _restore(self, directory: Path, kinds: Collection[str]) -> bool:
        """Make a bundle's files those of another dir, and bring the segments that it lacks; whether that was needed."""
        is_damaged = not _FILES.isdisjoint(kinds)
        model = self._find_model(directory, is_damaged=is_damaged)
        if model is None and (is_damaged or Kind.MISSING not in kinds):
            return False
        manifest = (model or directory) / MANIFEST
        with store_errors(f"mending {directory}"):
            self._bring_segments(frozenset(segments_in(manifest)), directory)
            if model is not None:
                # The frame first, as in a commit.
                for name in (FRAME, MANIFEST):
                    self._replace(directory / name, model / name)
        trace.point("repair.bundle-copied")
        if self._tombstones.has(directory.name):
            self._is_deleted(directory)
        return True

    def _bring_segments(self, digests: Collection[str], directory: Path) -> None:
        adopted: set[str] = set()
        owner = directory.name
        try:
            fetch_segments(digests, self._store, owner, self._sources, adopted)
            self._store.segments.flush()
        finally:
            self._store.segments.release(owner)
            if not is_committed(directory):
                self._store.remove_unreferenced(adopted)

    def _find_model(self, directory: Path, *, is_damaged: bool) -> Path | None:
        """The first whole copy of a bundle that its files should be like; None if they are, or there is none.

        Of a bundle that is whole here only the frame may differ: bits of it that change nothing of what it inflates to
        are found by comparing alone.
        """
        zone, bundle_id = identify(directory)
        for other in self._others:
            there = other.bundle_directory(zone, bundle_id)
            try:
                if not is_damaged and (
                    not has_same_bytes(directory / MANIFEST, there / MANIFEST)
                    or has_same_bytes(directory / FRAME, there / FRAME)
                ):
                    continue
                if not any(find_faults(there, zone, bundle_id, on_entry=lambda _: None)):
                    return there
            except OSError:
                # It is not there, or cannot be read: another dir may have it.
                continue
        return None

    def _replace(self, path: Path, model: Path) -> None:
        with contextlib.suppress(OSError):
            if has_same_bytes(path, model):
                return
        draft = self._draft()
        try:
            copy_file(model, draft)
            _put_in_place(draft, path)
        finally:
            _forget(draft)

    def _bring_absent(self) -> Iterator[Repaired | Problem]:
        failed: dict[tuple[str, str], str] = {}
        for other in self._others:
            for bundle in other.stored():
                made = bundle.header.metadata
                identity = (made.zone, made.bundle_id)
                directory = self._store.bundle_directory(*identity)
                if is_committed(directory):
                    continue
                try:
                    is_brought = self._bring(bundle)
                except StoreError as error:
                    failed[identity] = str(error)
                    continue
                failed.pop(identity, None)
                if is_brought:
                    yield Repaired(directory, f"was missing, and is copied from {other.directory}", identity)
        for identity, failure in failed.items():
            what = f"is missing here, and could not be copied: {failure}"
            yield problem(Kind.ABSENT, self._store.bundle_directory(*identity), what, identity)

    def _bring(self, bundle: StoredBundle) -> bool:
        """Copy a bundle unless it is deleted; whether it is there then."""
        bundle_id = bundle.header.metadata.bundle_id
        if self._tombstones.has(bundle_id):
            return False
        try:
            copy_with(bundle, self._store, (bundle.segments, *self._sources))
        except (NoSuchBundleError, ConflictError):
            # It was deleted there meanwhile, or its deletion here has not ended.
            return False
        trace.point("repair.bundle-copied")
        if self._tombstones.has(bundle_id):
            self._is_deleted(self._store.bundle_directory(bundle.header.metadata.zone, bundle_id))
            return False
        return True

    def _draft(self) -> Path:
        return self._store.directory / SEGMENTS / _DRAFT


def _put_in_place(draft: Path, path: Path) -> None:
    with store_errors(f"replacing {path}"):
        os.rename(draft, path)
        sync_directory(path.parent)


def _forget(draft: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(draft)


def _unmended(found: Problem, error: Exception) -> Problem:
    return replace(found, what=f"{found.what}; it could not be mended: {error}")
