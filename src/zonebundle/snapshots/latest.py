"""The latest listing of all trees of a staging, arranged: what is there, in which order, within the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zonebundle.model.identity import FileIdentity
from zonebundle.model.record import Limits
from zonebundle.model.report import Gap, Step
from zonebundle.snapshots.families import Family, arrange, family_name, newest_first
from zonebundle.snapshots.listing import Key, Listed, Listing
from zonebundle.snapshots.place import Placed


@dataclass(slots=True)
class Staged:
    """A file that was taken: where it was when it was last seen unchanged, and what was kept of it.

    `identity` is that of the state that was taken, None where that is not certain.
    """

    tree: int
    path: str
    mode: int
    placed: Placed
    identity: FileIdentity | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """What has been done so far with the files of a staging, by inode.

    `refused` is not staged for a reason that makes it a gap (number of the tree, path, reason); `left` is to be read
    behind; `vanished` was listed and gone before it could be staged, with the family that it was in. `superseded` was
    taken, and then truncated and taken again: its lines may be nowhere else.
    """

    staged: dict[Key, Staged] = field(default_factory=dict)
    superseded: list[tuple[Key, Staged]] = field(default_factory=list)
    refused: dict[Key, tuple[int, str, str]] = field(default_factory=dict)
    left: set[Key] = field(default_factory=set)
    vanished: dict[Key, tuple[Listed, Family]] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def is_settled(self, key: Key) -> bool:
        """Whether there is nothing more to try with a file."""
        return key in self.staged or key in self.refused or key in self.left


class Latest:
    """Listings, one a tree. `staged` are the files taken so far, for which a listing has no status.

    `names` is every path with its key, `keys` are the inodes, `current` those of current files. `order` holds each
    inode once, newest first but along each family's flow, and no more than the limits allow; `beyond` is the number and
    the bytes of what they leave out.
    """

    def __init__(self, listings: Sequence[Listing], staged: Mapping[Key, Staged], limits: Limits) -> None:
        self.listings = listings
        self.names = names_of(listings)
        self.keys = set(self.names.values())
        self.families = arrange(file for listing in listings for file in listing.files)
        self.current = {family.current for family in self.families.values()}
        self._staged = staged
        self.order, self.beyond = self._limit(newest_first(self.families.values(), self._mtime_of), limits)

    @property
    def is_complete(self) -> bool:
        return all(listing.is_complete for listing in self.listings)

    def family_of(self, file: Listed) -> Family:
        """The family of one of these files."""
        return self.families[family_name(file.tree, file.path)]

    def _mtime_of(self, file: Listed) -> int:
        return file.status.st_mtime_ns if file.status is not None else self._staged[file.key].placed.mtime_ns

    def _size_of(self, file: Listed) -> int:
        return file.status.st_size if file.status is not None else self._staged[file.key].placed.size

    def _limit(self, files: list[Listed], limits: Limits) -> tuple[list[Listed], tuple[int, int]]:
        kept: dict[Key, Listed] = {}
        total = beyond = lost = 0
        for file in files:
            if file.key in kept:
                continue
            size = min(self._size_of(file), limits.file)
            if beyond or len(kept) >= limits.files or total + size > limits.bundle:
                beyond += 1
                lost += size
                continue
            kept[file.key] = file
            total += size
        return list(kept.values()), (beyond, lost)


def names_of(listings: Sequence[Listing]) -> dict[tuple[int, str], Key]:
    """Every path with its key, by number of the tree and path."""
    return {(file.tree, file.path): file.key for listing in listings for file in listing.files}
