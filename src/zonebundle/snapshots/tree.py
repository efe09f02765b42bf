"""A log tree as staging sees it, and the identities of the files in it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zonebundle.host import syscalls
from zonebundle.model.identity import FileIdentity
from zonebundle.snapshots.base import Kind, KnownFiles, OpenTree, log_name
from zonebundle.snapshots.listing import TreeListing
from zonebundle.snapshots.place import Placed, live_parts


@dataclass(slots=True)
class Tree:
    """A log tree that is being staged: how, and what identities of its files are made of.

    `kind` falls back where something does not work. Subvolumes below it have another device than `device`, and other
    identities: of their files none is told.
    """

    open: OpenTree
    kind: Kind
    listing: TreeListing
    device: int
    filesystem: int

    def name(self, path: str = "") -> str:
        return log_name(self.open.tree, path)

    def identify(self, source: int, status: os.stat_result, placed: Placed) -> FileIdentity | None:
        """The state of a file that was placed as a whole, from `status` before; None if it may have changed meanwhile.

        Of a link the time of birth is left to the sealer, which finds it at the link.
        """
        if not placed.parts or placed.parts[0].start or any(part.origin == "live" for part in placed.parts):
            return None
        if status.st_dev != self.device or placed.size != status.st_size:
            return None
        born = 0
        if not placed.is_link:
            now = os.fstat(source)
            if (now.st_mtime_ns, now.st_ctime_ns) != (status.st_mtime_ns, status.st_ctime_ns):
                return None
            born = syscalls.birth_time_ns(source)
        identity = FileIdentity(
            self.filesystem, status.st_ino, born, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )
        return identity if identity.is_settled(time.time_ns()) else None

    def find_known(
        self, files: KnownFiles, asked: Sequence[os.stat_result], limit: int
    ) -> Iterator[tuple[os.stat_result, Placed]]:
        """Those of the files listed that are in a state which the store has.

        A state is told by inode, size, mtime and ctime. The birth, which would cost a system call each, is left out:
        an inode that was used again has another ctime, which nobody but the kernel's clock can set.
        """
        statuses = {status.st_ino: status for status in asked if status.st_dev == self.device and status.st_nlink == 1}
        if not statuses:
            return
        now = time.time_ns()
        for inode, known in files.known(self.filesystem, list(statuses)).items():
            status, identity = statuses[inode], known.identity
            state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if (
                (identity.size, identity.mtime_ns, identity.ctime_ns) == state
                and identity.size <= limit
                and identity.is_settled(now)
            ):
                yield (
                    status,
                    Placed(identity.size, identity.mtime_ns, live_parts(0, identity.size), pieces=known.pieces),
                )


def open_tree(number: int, tree: OpenTree, kind: Kind) -> Tree:
    """The tree with that number."""
    device = os.fstat(tree.descriptor).st_dev
    filesystem = tree.filesystem if tree.filesystem is not None else os.fstatvfs(tree.descriptor).f_fsid
    return Tree(tree, kind, TreeListing(number, tree.tree, tree.descriptor), device, filesystem)
