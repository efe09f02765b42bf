"""What the index is told when a log loses our link: its ctime has changed, by us alone."""

from __future__ import annotations

import os

from zonebundle.model.identity import FileIdentity
from zonebundle.model.record import Area
from zonebundle.snapshots.areas import Unlinked
from zonebundle.store.index import Index


def renewer(index: Index | None, area: Area) -> Unlinked | None:
    """What is to be called for each file of an area that is destroyed; None if nobody has to know."""
    if index is None or area.kind != "staged":
        return None
    try:
        filesystem = os.statvfs(area.path).f_fsid
    except OSError:
        # It is gone already, or cannot be reached: destroying it will tell.
        return None

    def unlinked(before: os.stat_result, after: os.stat_result) -> None:
        known = index.find_file(filesystem, before.st_ino)
        if known is not None and _is_in_state(known.identity, before) and _is_same_content(before, after):
            index.renew([(known.identity, after.st_ctime_ns)])

    return unlinked


def _is_in_state(identity: FileIdentity, status: os.stat_result) -> bool:
    return (identity.size, identity.mtime_ns, identity.ctime_ns) == (
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _is_same_content(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
