"""What a staging tells the record: logs, gaps, steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from zonebundle.model.identity import FileIdentity
from zonebundle.model.quantities import format_size
from zonebundle.model.record import KnownLog, Limits, LogFile
from zonebundle.model.report import Gap, Outcome, Step
from zonebundle.model.zone import LogTree
from zonebundle.snapshots.base import log_name, path_in_source
from zonebundle.snapshots.families import Family
from zonebundle.snapshots.latest import Latest, Taken
from zonebundle.snapshots.listing import Key
from zonebundle.snapshots.place import Placed, live_parts

Told = LogFile | KnownLog | Gap | Step


def tell(trees: Sequence[LogTree], taken: Taken, latest: Latest, limits: Limits) -> Iterator[Told]:
    """The logs, newest first and under the names of the latest listing, then what is missing or not as usual."""
    left = left_bytes = 0
    for file in latest.order:
        staged = taken.staged.get(file.key)
        if staged is not None:
            yield _log(trees[file.tree], file.path, file.key, staged.mode, staged.placed, staged.identity)
        elif file.key not in taken.refused and file.status is not None:
            size = file.status.st_size
            first = max(0, size - limits.file)
            placed = Placed(size, file.status.st_mtime_ns, live_parts(first, size))
            yield _log(trees[file.tree], file.path, file.key, file.status.st_mode & 0o7777, placed)
            left, left_bytes = left + 1, left_bytes + size - first
    # Rotated out of existence, removed or truncated after they were taken.
    for key, staged in (*taken.superseded, *(pair for pair in taken.staged.items() if pair[0] not in latest.keys)):
        yield _log(trees[staged.tree], staged.path, key, staged.mode, staged.placed, staged.identity)
    yield from _missing(trees, taken, latest, limits)
    yield from taken.steps
    yield from _skips(trees, latest)
    if left:
        detail = f"{left} logs ({format_size(left_bytes)}) were not staged in time; they are read behind"
        yield Step("stage", Outcome.TIMEOUT, detail=detail)


def _log(
    tree: LogTree, path: str, key: Key, mode: int, placed: Placed, identity: FileIdentity | None = None
) -> LogFile | KnownLog:
    if placed.known is not None:
        return KnownLog(
            tree.source,
            path_in_source(tree, path),
            tree.path,
            path,
            placed.size,
            mode,
            placed.mtime_ns,
            key[1],
            placed.known.pieces_json,
        )
    return LogFile(
        source=tree.source,
        path=os.fsencode(path_in_source(tree, path)),
        host_root=tree.path,
        host_path=os.fsencode(path),
        size=placed.size,
        mode=mode,
        mtime_ns=placed.mtime_ns,
        inode=key[1],
        parts=placed.parts,
        # What grew since then is read behind: together that is another state.
        identity=identity if identity is not None and identity.size == placed.size else None,
    )


def _missing(trees: Sequence[LogTree], taken: Taken, latest: Latest, limits: Limits) -> Iterator[Gap]:
    yield from taken.gaps
    for key, (number, path, reason) in taken.refused.items():
        if key in latest.keys:
            yield Gap(log_name(trees[number], path), reason)
    for tree, listing in zip(trees, latest.listings, strict=True):
        for path, reason in listing.lost.items():
            yield Gap(log_name(tree, path), reason)
    for key, (file, family) in taken.vanished.items():
        if key not in taken.staged and key not in latest.keys and _left_a_hole(taken, latest, key, family):
            reason = "was removed before it could be staged, and older ones of its family were not"
            yield Gap(log_name(trees[file.tree], file.path), reason)
    if latest.beyond[0]:
        files, size = latest.beyond
        allowed = f"{limits.files} files, {format_size(limits.bundle)}"
        reason = f"beyond the limits of a bundle ({allowed}); the newest logs are kept"
        yield Gap(f"{files} logs, {format_size(size)}", reason)


def _left_a_hole(taken: Taken, latest: Latest, key: Key, family: Family) -> bool:
    """Whether older lines than those of a vanished file are there, while it was not replaced by a compressed one."""
    now = latest.families.get(family.name)
    if now is not None and now.has_compressed:
        return False
    keys = [file.key for file in family.files]
    return any(older in taken.staged for older in keys[keys.index(key) + 1 :])


def _skips(trees: Sequence[LogTree], latest: Latest) -> Iterator[Step]:
    for tree, listing in zip(trees, latest.listings, strict=True):
        if listing.skipped:
            counts = ", ".join(f"{count} × {kind}" for kind, count in sorted(listing.skipped.items()))
            yield Step(log_name(tree, ""), Outcome.SKIP, detail=f"not read as logs: {counts}")
