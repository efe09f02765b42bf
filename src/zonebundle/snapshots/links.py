"""Hard links that a zone may have planted in its logs."""

from __future__ import annotations

import os
from pathlib import Path

from zonebundle.errors import HostError
from zonebundle.host.files import open_directory_beneath
from zonebundle.model.ids import parse_snapshot_name
from zonebundle.snapshots.place import FILES


def is_suspect(status: os.stat_result, owner: int) -> bool:
    """Whether a file has several links and another owner than its directory: it may be another's (see Links)."""
    return status.st_nlink > 1 and status.st_uid != owner


class Links:
    """Tells a file that was linked into a log directory from one that was made there; `staging` is where our links are.

    Who may write in a directory can link files into it that he cannot read (where fs.protected_hardlinks is off, to
    make a link needs no right to the file), to have them bundled. A link keeps its owner, so a file with several links
    whose owner is not the directory's is not trusted. Links that staging itself made do not count.
    """

    def __init__(self, staging: Path) -> None:
        self._staging = staging
        self._ours: dict[int, int] | None = None
        self._owners: dict[tuple[int, str], int | None] = {}

    def is_planted(self, root: int, path: str, status: os.stat_result) -> bool:
        """Whether the file `path` below the directory `root`, whose status shows several links, is not trusted."""
        if status.st_uid == self._owner(root, os.path.dirname(path)):
            return False
        if self._ours is None:
            self._ours = _count_ours(self._staging)
        return status.st_nlink - self._ours.get(status.st_ino, 0) > 1

    def _owner(self, root: int, directory: str) -> int | None:
        key = (root, directory)
        if key not in self._owners:
            try:
                descriptor = open_directory_beneath(root, directory)
            except (OSError, HostError):
                return None
            self._owners[key] = os.fstat(descriptor).st_uid
            os.close(descriptor)
        return self._owners[key]


def _count_ours(staging: Path) -> dict[int, int]:
    """How often each inode is linked into areas of a staging directory, whoever's: only root and we can write there."""
    counts: dict[int, int] = {}
    try:
        names = os.listdir(staging)
    except OSError:
        # Without it there is no area either.
        return counts
    for name in names:
        if parse_snapshot_name(name) is None:
            continue
        try:
            with os.scandir(staging / name / FILES) as entries:
                for entry in entries:
                    counts[entry.inode()] = counts.get(entry.inode(), 0) + 1
        except OSError:
            # No files in it, or destroyed at this moment: then its links do not count any more.
            continue
    return counts
