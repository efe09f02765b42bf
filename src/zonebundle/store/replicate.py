"""Bringing a committed bundle into another store dir, byte for byte, in the order in which it was committed there:

segments durable → frame durable → manifest durable, under its temporary name → renamed to manifest.jsonl
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from zonebundle.errors import DamagedError, NoSuchBundleError, StoreError
from zonebundle.host import trace
from zonebundle.host.files import sync_directory, write_all
from zonebundle.store.bundle import FRAME, MANIFEST, StoredBundle, segments_in
from zonebundle.store.check_bundle import find_faults
from zonebundle.store.failure import explain, store_errors
from zonebundle.store.segments import Segments
from zonebundle.store.store import Store

_MANIFEST_DRAFT = "manifest.tmp"
_READ = 1 << 20
# A pack is 4 MiB of logs, which deflate enlarges by less than a hundredth: more is no segment, and is not read.
_LARGEST_SEGMENT = 8 << 20


def copy_bundle(bundle: StoredBundle, target: Store) -> int:
    """Bring a bundle into another store dir; returns the bytes written, 0 if it is there already and whole.

    Raises DamagedError if it is damaged here, or there already and damaged there; NoSuchBundleError if it is deleted
    meanwhile; StoreError. After an error there is no trace of it in `target`.
    """
    return copy_with(bundle, target, (bundle.segments,))


def copy_with(bundle: StoredBundle, target: Store, sources: Sequence[Segments]) -> int:
    """As `copy_bundle`; each segment is taken from the first of `sources` that has it whole."""
    try:
        return 0 if _is_there(bundle, target) else _copy(bundle, target, sources)
    except StoreError as error:
        # Whatever was missing then is no damage.
        if not bundle.manifest.exists():
            raise _gone(bundle) from error
        if isinstance(error, DamagedError):
            # A manifest that is damaged leads to segments that never were: it is to be named, not those.
            _check_files(bundle, bundle.directory, MANIFEST)
        raise


def is_whole_and_other(bundle: StoredBundle, target: Store) -> bool:
    """Whether `target` has a bundle of that ID that is another one, and this one is whole. Raises StoreError."""
    made = bundle.header.metadata
    with store_errors(f"reading {bundle.directory}"), contextlib.suppress(NoSuchBundleError, FileNotFoundError):
        there = target.find(made.zone, made.bundle_id)
        return (
            not has_same_bytes(there.manifest, bundle.manifest)
            and not any(find_faults(there.directory, made.zone, made.bundle_id, on_entry=lambda _: None))
            and not any(find_faults(bundle.directory, made.zone, made.bundle_id, on_entry=lambda _: None))
            and all(map(bundle.segments.exists, segments_in(bundle.manifest)))
        )
    return False


def fetch_segments(
    digests: Iterable[str], target: Store, owner: str, sources: Sequence[Segments], adopted: set[str]
) -> int:
    """Bring those of the segments that `target` lacks, all under the lease of `owner`; returns the bytes written.

    `adopted` gets those that were brought, which are durable after the next flush. Raises DamagedError, StoreError.
    """
    written = 0
    for digest in digests:
        try:
            target.segments.lease(owner, (digest,))
        except DamagedError:
            data = read_segment(digest, sources)
            target.segments.adopt(digest, data, owner)
            adopted.add(digest)
            written += len(data)
    return written


def read_segment(digest: str, sources: Sequence[Segments]) -> bytes:
    """The bytes of a segment, from the first source where they are what the digest says.

    Raises the DamagedError of the last source, or its StoreError.
    """
    last = len(sources) - 1
    for number, segments in enumerate(sources):
        try:
            return _read_segment(segments, digest)
        except StoreError:
            if number == last:
                raise
    raise StoreError(f"there is no other store dir to take segment {digest} from")


def copy_file(source: Path, target: Path) -> int:
    """Copy a file of a bundle to a new name, and make its bytes durable; returns their number. Raises StoreError.

    A source that is missing raises DamagedError.
    """
    with store_errors(f"copying {source} to {target}"), contextlib.ExitStack() as stack:
        try:
            reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise DamagedError(f"{source} is missing; restore the bundle from a copy of the store") from None
        stack.callback(os.close, reading)
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, writing)
        written = 0
        while block := os.pread(reading, _READ, written):
            write_all(writing, block)
            written += len(block)
        if os.fstat(writing).st_size != written:
            raise OSError(errno.EIO, "the file is not as long as what was written", str(target))
        os.fsync(writing)
    return written


def has_same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are equal, byte by byte (filecmp remembers what it found, and would miss a damage since)."""
    with one.open("rb") as first, other.open("rb") as second:
        while block := first.read(_READ):
            if second.read(_READ) != block:
                return False
        return not second.read(1)


def _read_segment(segments: Segments, digest: str) -> bytes:
    with os.fdopen(segments.open(digest), "rb") as file:
        try:
            data = file.read(_LARGEST_SEGMENT)
        except OSError as error:
            raise explain(f"reading segment {segments.path(digest)}", error) from error
    if blake3(data).hexdigest() != digest:
        raise DamagedError(f"segment {segments.path(digest)} is damaged; restore it from a copy of the store")
    return data


def _copy(bundle: StoredBundle, target: Store, sources: Sequence[Segments]) -> int:
    made = bundle.header.metadata
    adopted: set[str] = set()
    draft = target.make_draft(made.zone, made.bundle_id)
    try:
        target.segments.lease(made.bundle_id)
        with store_errors(f"reading {bundle.manifest}"):
            digests = frozenset(segments_in(bundle.manifest))
        written = fetch_segments(digests, target, made.bundle_id, sources, adopted)
        target.segments.flush()
        if missing := target.segments.missing(made.bundle_id):
            raise StoreError(f"{len(missing)} segments of bundle {made.bundle_id} could not be kept; copy it again")
        trace.point("replicate.segments-durable")
        written += copy_file(bundle.directory / FRAME, draft / FRAME)
        trace.point("replicate.frame-written")
        written += copy_file(bundle.manifest, draft / _MANIFEST_DRAFT)
        _check_copy(bundle, draft)
        with store_errors(f"writing {draft}"):
            # As in a seal: the names up to the store's own directory.
            for directory in (draft, draft.parent, draft.parent.parent):
                sync_directory(directory)
        if not bundle.manifest.exists():
            raise _gone(bundle)
        target.publish(draft, _MANIFEST_DRAFT)
        trace.point("replicate.committed")
    except BaseException:
        _abandon(target, draft, made.bundle_id, adopted)
        raise
    target.segments.release(made.bundle_id)
    return written


def _check_copy(bundle: StoredBundle, draft: Path) -> None:
    """Look at what was written and not at the source: whatever happened to the bytes on the way is in it."""
    _check_files(bundle, draft, _MANIFEST_DRAFT)


def _check_files(bundle: StoredBundle, directory: Path, manifest: str) -> None:
    made = bundle.header.metadata
    with store_errors(f"reading {directory}"):
        for fault in find_faults(directory, made.zone, made.bundle_id, manifest=manifest, on_entry=lambda _: None):
            raise DamagedError(f"{bundle.directory / fault.name} {fault.what}; restore the bundle from a copy")


def _abandon(target: Store, draft: Path, owner: str, adopted: set[str]) -> None:
    # As a draft is abandoned: only what has its final name can be removed.
    with contextlib.suppress(StoreError):
        target.segments.flush()
    target.segments.release(owner)
    target.unpublish(draft)
    target.remove_draft(draft)
    target.remove_unreferenced(adopted)


def _is_there(bundle: StoredBundle, target: Store) -> bool:
    made = bundle.header.metadata
    try:
        there = target.find(made.zone, made.bundle_id)
    except NoSuchBundleError:
        return False
    with store_errors(f"reading {there.directory}"):
        is_same = there.size == bundle.size and has_same_bytes(there.manifest, bundle.manifest)
        if not is_same or not all(map(target.segments.exists, segments_in(there.manifest))):
            raise DamagedError(
                f"{there.directory} is damaged, or not the same bundle as {bundle.directory}; "
                "mend it with `zone-bundle verify --repair`"
            )
    return True


def _gone(bundle: StoredBundle) -> NoSuchBundleError:
    return NoSuchBundleError(bundle.header.metadata.zone, bundle.header.metadata.bundle_id)
