"""A log tree as staging sees it, and the identities of the files in it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from zonebundle.host import syscalls
from zonebundle.model.identity import FileIdentity, are_settled
from zonebundle.snapshots.base import Kind, KnownFiles, OpenTree, log_name
from zonebundle.snapshots.listing import Listed, TreeListing
from zonebundle.snapshots.place import Placed


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
        # What is read live is not certain; it comes before what was staged.
        if not placed.parts or placed.parts[0].start or placed.parts[0].origin == "live":
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

    def find_known(self, files: KnownFiles, listed: Iterable[Listed], limit: int) -> Iterator[tuple[Listed, Placed]]:
        """Those of this tree's files that are in a state which the store has.

        A state is told by inode, size, mtime and ctime. The birth, which would cost a system call each, is left out:
        an inode that was used again has another ctime, which nobody but the kernel's clock can set.
        """
        asked: dict[int, tuple[Listed, os.stat_result]] = {}
        for file in listed:
            status = file.status
            if status is not None and status.st_size and status.st_nlink == 1 and status.st_dev == self.device:
                asked[status.st_ino] = file, status
        if not asked:
            return
        now = time.time_ns()
        for inode, known in files.known(self.filesystem, list(asked)).items():
            file, status = asked[inode]
            size, mtime, ctime = state = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            if known.state == state and size <= limit and are_settled(mtime, ctime, now):
                yield file, Placed(size, mtime, known=known)


def open_tree(number: int, tree: OpenTree, kind: Kind) -> Tree:
    """The tree with that number."""
    device = os.fstat(tree.descriptor).st_dev
    filesystem = tree.filesystem if tree.filesystem is not None else os.fstatvfs(tree.descriptor).f_fsid
    return Tree(tree, kind, TreeListing(number, tree.tree, tree.descriptor), device, filesystem)
