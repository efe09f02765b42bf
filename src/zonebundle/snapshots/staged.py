"""Stages the logs of trees into an area: reflinks, hard links, copies, and what is left to be read behind.

A living zone rotates its logs while they are staged. Lines flow from the current log of a family to ever older names,
so files are taken along that flow, and then the trees are listed again: an inode that was not seen before is taken too,
and what had moved on is looked at once more, in that order. When a listing shows nothing new, every line up to the
youngest one that was staged is there; some may be there twice. A file is told by its inode, size and mtime, never by
its name alone, because rotation reuses names, and file systems reuse inode numbers at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from zonebundle.errors import HostError, NotRegularFileError
from zonebundle.host.files import NO_SPACE, open_regular_beneath
from zonebundle.model.identity import FileIdentity
from zonebundle.model.record import Limits
from zonebundle.model.report import Gap
from zonebundle.snapshots.base import Choice, Kind, KnownFiles, OpenTree
from zonebundle.snapshots.latest import Latest, Staged, Taken, names_of
from zonebundle.snapshots.links import Links
from zonebundle.snapshots.listing import Key, Listed, Listing
from zonebundle.snapshots.outcome import Told, tell
from zonebundle.snapshots.place import Placed, RewrittenError, live_parts
from zonebundle.snapshots.placing import LITTLE, Bounds, Near, Placing
from zonebundle.snapshots.tree import Tree, open_tree

# Listings after the first one, until they show nothing new.
_LISTINGS = 5
# Listing goes on this many seconds after the deadline: a log that is not listed is lost, one that is not staged is not.
_LISTING_GRACE = 0.25
# Of the time, this much (in seconds) is kept for handing over each log to the record.
_HAND_OVER = 30e-6

# The number of a tree, and the path of a directory below it.
Directory = tuple[int, str]


def stage(
    trees: Sequence[tuple[OpenTree, Choice]],
    area: Path,
    number: int,
    *,
    deadline: float,
    copy_limit: int,
    limits: Limits,
    living: bool,
    durable: bool,
    known: KnownFiles | None = None,
    prepare: Callable[[], None] | None = None,
    near: Near | None = None,
) -> Iterator[Told]:
    """Stage the logs of `trees` into `area`, whose number in the record is `number`.

    The area is made by `prepare` (None: it is prepared already) when something is to be put there, which may be never:
    where a few small current logs are all that is to be staged, they are copied into `near`, the bundle's spool entry.

    Yields the logs, newest first, then gaps and steps. `deadline` is a time.monotonic(): what is not staged by then is
    a log with one live part. `copy_limit` bounds the bytes copied of one log (older ones become a live part), `limits`
    those kept. With `living`, the zone runs on. With `durable`, everything staged is synced before the iterator ends
    (removal follows); as nobody writes a removed log, its current logs may then be hard linked too.

    A file with several links whose owner is not that of its directory is passed over, with a gap: who may write in the
    directory, but not read the file, could have linked it there to have it bundled (a link needs no right to read where
    fs.protected_hardlinks is off). Our own links in other areas do not count.

    `known` files are not staged at all. Nothing is known where the logs are removed afterwards: what they are known by
    could not be compared with them any more.

    Blocks; run it in a thread. It looks at the clock between files and chunks and holds no lock, so it may be
    abandoned, with the descriptors of the trees. Raises SnapshotError if syncing failed, after everything was yielded.
    """
    staging = _Staging(
        trees,
        area,
        number,
        deadline,
        copy_limit,
        limits,
        links_current=durable and not living,
        known=None if durable else known,
        prepare=prepare,
        near=None if durable else near,
    )
    try:
        staging.run()
        yield from tell([tree.tree for tree, _ in trees], staging.taken, staging.latest, limits)
        if durable:
            staging.placing.sync()
    finally:
        staging.placing.close()


class _Staging:
    """One staging: `run` takes the files; then `taken` and `latest` say what came of it."""

    def __init__(
        self,
        trees: Sequence[tuple[OpenTree, Choice]],
        area: Path,
        number: int,
        deadline: float,
        copy_limit: int,
        limits: Limits,
        *,
        links_current: bool,
        known: KnownFiles | None,
        prepare: Callable[[], None] | None,
        near: Near | None,
    ) -> None:
        self._trees = [open_tree(index, tree, choice.kind) for index, (tree, choice) in enumerate(trees)]
        self._limits = limits
        self._known = known
        self._stop = deadline
        self._end = max(deadline, time.monotonic()) + _LISTING_GRACE
        self.taken = Taken()
        # Directories in which a log was found shorter than it was listed.
        self._shrunk: set[Directory] = set()
        self._links = Links(area.parent)
        self.latest = Latest([], self.taken.staged, limits)
        self.placing = Placing(
            area,
            number,
            Bounds(copy_limit, limits.file, self._is_late),
            self.taken.steps,
            prepare=prepare,
            near=near,
            links_current=links_current,
        )

    def _is_late(self) -> bool:
        return self.placing.is_refused or time.monotonic() >= self._stop

    def _is_over(self) -> bool:
        return time.monotonic() >= self._end

    def run(self) -> None:
        """Take everything, and follow the trees until they show nothing new."""
        self.latest = self._arrange(self._list())
        order = self.latest.order
        self._take_known(order)
        # Handing the logs over takes time as well.
        self._stop -= min(len(order) * _HAND_OVER, max(0.0, self._stop - time.monotonic()) / 2)
        if not self._is_little(order):
            self.placing.near = None
        self._stage_all(order)
        if not self.latest.is_complete:
            self._gap_everywhere("the budget ended while its directories were listed: what was not listed is missing")
            return
        for _ in range(_LISTINGS):
            if not self._follow():
                return
        self._gap_everywhere(
            f"files came, went or were renamed all the time ({_LISTINGS + 1} listings): "
            "lines between its files may be missing"
        )

    def _is_little(self, order: Iterable[Listed]) -> bool:
        """Whether all that is to be staged are current logs that will be copied, and small."""
        if self.placing.near is None or any(tree.kind in (Kind.BTRFS, Kind.REFLINK) for tree in self._trees):
            return False
        size = 0
        for file in order:
            if file.key not in self.taken.staged and file.status is not None and file.status.st_size:
                size += file.status.st_size
                if file.key not in self.latest.current or size > LITTLE:
                    return False
        return True

    def _list(self) -> list[Listing]:
        return [tree.listing.look(self.taken.staged, self._is_over) for tree in self._trees]

    def _arrange(self, listings: list[Listing]) -> Latest:
        return Latest(listings, self.taken.staged, self._limits)

    def _follow(self) -> bool:
        """List again and take what is new; False if nothing is."""
        listings = self._list_again()
        if not all(listing.is_complete for listing in listings):
            self._gap_everywhere("the budget ended before it was clear whether files were rotated meanwhile")
            return False
        is_same = not self._shrunk and self._show_the_same(listings)
        if is_same and not self._waiting():
            return False
        before, self.latest = self.latest, self._arrange(listings)
        # What is left is read behind, with the sizes of this listing, which is later than everything that was staged.
        if is_same and self._is_late():
            return False
        known, present = {file.key for file in before.order}, self.latest.keys
        gone = [file for file in before.order if file.key not in present and not self.taken.is_settled(file.key)]
        self.taken.vanished.update((file.key, (file, before.family_of(file))) for file in gone)
        stirred, self._shrunk = self._shrunk | {_directory_of(file) for file in gone}, set()
        moved = self._moved()
        waiting = self._waiting()
        self._stage_all(waiting)
        fresh = (present - known) | {file.key for file in waiting}
        stirred.update(_directory_of(file) for file in self.latest.order if file.key in fresh)
        stirred.update(_directory_of(self.taken.staged[key]) for key in moved)
        waited = {file.key for file in waiting}
        for file in self.latest.order:
            # Where something came, moved, went or was cut, a file may have been written to until its successor came,
            # and one that took the place of another may not have been complete when it was taken.
            if (_directory_of(file) in stirred or file.key in moved) and file.key not in waited:
                self._verify(file)
        return True

    def _list_again(self) -> list[Listing]:
        """A fresh listing of each tree, or the last one where the stamps of its directories say that it still holds.

        Where logs are only copied, the file system may be an odd one (overlay, network): there, all are listed.
        """
        return [
            before
            if tree.kind is not Kind.COPY and tree.listing.is_unchanged(self._is_over)
            else tree.listing.look(self.taken.staged, self._is_over)
            for tree, before in zip(self._trees, self.latest.listings, strict=True)
        ]

    def _show_the_same(self, listings: list[Listing]) -> bool:
        if all(now is before for now, before in zip(listings, self.latest.listings, strict=True)):
            return True
        return names_of(listings) == self.latest.names

    def _waiting(self) -> list[Listed]:
        return [file for file in self.latest.order if not self.taken.is_settled(file.key)]

    def _moved(self) -> set[Key]:
        """The staged files that do not have the name any more under which they were taken, but another one."""
        names, present = self.latest.names, self.latest.keys
        return {
            key
            for key, staged in self.taken.staged.items()
            if key in present and names.get((staged.tree, staged.path)) != key
        }

    def _verify(self, file: Listed) -> None:
        """Take a staged file again if it is not as it was when it was taken."""
        staged = self.taken.staged.get(file.key)
        if staged is None:
            return
        try:
            status = os.stat(file.path, dir_fd=self._trees[file.tree].open.descriptor, follow_symlinks=False)
        except OSError:
            # It moved on: the next listing shows where to.
            return
        if (status.st_dev, status.st_ino) != file.key:
            return
        if (status.st_size, status.st_mtime_ns) == (staged.placed.size, staged.placed.mtime_ns):
            staged.tree, staged.path = file.tree, file.path
        elif self._is_late():
            self._leave(file.key, status)
        else:
            self._stage(file, again=True)

    def _take_known(self, files: Iterable[Listed]) -> None:
        """Take the files that are in a state which the store has. Their inodes have been ours to read before."""
        if self._known is None:
            return
        by_tree: list[list[Listed]] = [[] for _ in self._trees]
        for file in files:
            by_tree[file.tree].append(file)
        for tree, listed in zip(self._trees, by_tree, strict=True):
            for file, placed in tree.find_known(self._known, listed, self._limits.file):
                assert file.status is not None
                self._note(file, file.key, file.status, placed)

    def _stage_all(self, files: Iterable[Listed]) -> None:
        for file in files:
            if self._is_late():
                return
            if file.key not in self.taken.staged:
                self._stage(file)

    def _stage(self, file: Listed, *, again: bool = False) -> None:
        """Take what is found under a file's name, be it the file that was listed or another one by now."""
        tree = self._trees[file.tree]
        if file.status is not None and not file.status.st_size and self._is_empty(tree, file):
            return
        try:
            source, status = open_regular_beneath(tree.open.descriptor, file.path)
        except (FileNotFoundError, NotRegularFileError):
            return
        except OSError as error:
            self._refuse(file, file.key, f"cannot be opened: {error.strerror}")
            return
        except HostError as error:
            self._refuse(file, file.key, str(error))
            return
        try:
            key = (status.st_dev, status.st_ino)
            if key not in self.taken.staged or (again and key == file.key):
                self._take(tree, file, key, source, status)
        finally:
            os.close(source)

    def _is_empty(self, tree: Tree, file: Listed) -> bool:
        """Whether a file is still as empty as it was listed. There is nothing to stage, then."""
        try:
            status = os.stat(file.path, dir_fd=tree.open.descriptor, follow_symlinks=False)
        except OSError:
            return False
        if status.st_size or (status.st_dev, status.st_ino) != file.key:
            return False
        self._note(file, file.key, status, Placed(0, status.st_mtime_ns, ()))
        return True

    def _take(self, tree: Tree, file: Listed, key: Key, source: int, status: os.stat_result) -> None:
        if status.st_nlink > 1 and self._links.is_planted(tree.open.descriptor, file.path, status):
            reason = "is a hard link to a file of another owner than its directory's; such links are not followed"
            self._refuse(file, key, reason)
            return
        try:
            placed = self.placing.place(tree, source, status, is_current=file.key in self.latest.current)
        except RewrittenError as error:
            self._leave(key, status)
            self.taken.gaps.append(Gap(tree.name(file.path), f"{error}; it is read behind, as it is then"))
        except OSError as error:
            if error.errno in NO_SPACE:
                self._leave(key, status)
            else:
                self._refuse(file, key, f"cannot be staged: {error.strerror}")
        else:
            before = self.taken.staged.get(key)
            if before is not None and not self._has_grown(source, before.placed):
                # What was cut off may be nowhere else, and the copy that was made of it has to be looked at again.
                self.taken.superseded.append((key, before))
                self._shrunk.add(_directory_of(file))
            elif file.status is not None and file.key == key and placed.size < file.status.st_size:
                self._shrunk.add(_directory_of(file))
            self._note(file, key, status, placed, tree.identify(source, status, placed))

    def _has_grown(self, source: int, placed: Placed) -> bool:
        """Whether a log still begins with what was taken of it before; of a known one, nobody can tell that."""
        if placed.known is not None:
            return False
        if not placed.parts:
            return True
        return self.placing.continues(source, placed.parts[-1])

    def _note(
        self,
        file: Listed,
        key: Key,
        status: os.stat_result,
        placed: Placed,
        identity: FileIdentity | None = None,
    ) -> None:
        self.taken.staged[key] = Staged(file.tree, file.path, status.st_mode & 0o7777, placed, identity)
        self.taken.refused.pop(key, None)

    def _refuse(self, file: Listed, key: Key, reason: str) -> None:
        self.taken.refused[key] = (file.tree, file.path, reason)

    def _leave(self, key: Key, status: os.stat_result) -> None:
        """Leave a file, or what it grew by since it was taken, to be read behind."""
        staged = self.taken.staged.get(key)
        if staged is None:
            self.taken.left.add(key)
        elif status.st_size > staged.placed.size:
            placed = staged.placed
            before = live_parts(0, placed.size) if placed.known is not None else placed.parts
            parts = (*before, *live_parts(placed.size, status.st_size))
            staged.placed = Placed(status.st_size, status.st_mtime_ns, parts)

    def _gap_everywhere(self, reason: str) -> None:
        self.taken.gaps.extend(Gap(tree.name(), reason) for tree in self._trees)


def _directory_of(file: Listed | Staged) -> Directory:
    return file.tree, file.path.rpartition("/")[0]
