"""What the index is told when a log loses our link: its ctime has changed, by us alone."""

from __future__ import annotations

import os

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
        content = before.st_size, before.st_mtime_ns
        is_same = content == (after.st_size, after.st_mtime_ns)
        if known is not None and is_same and known.state == (*content, before.st_ctime_ns):
            index.renew([(known.identity, after.st_ctime_ns)])

    return unlinked
