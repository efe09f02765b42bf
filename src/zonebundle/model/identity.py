"""The identity of one state of a file: where it is the same, the bytes are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Times of a file may be coarser than its changes (4 ms before Linux 6.13, 10 ms with 100 ticks a second): a change in
# the same tick leaves no mark. git has the same care, with its index's own time.
TRUSTED_AGE_NS = 20_000_000
# Some file systems keep whole seconds (ext4 with small inodes), or two of them (FAT).
_COARSE_NS = 1_000_000_000
_COARSE_AGE_NS = 2 * _COARSE_NS + TRUSTED_AGE_NS


def are_settled(mtime_ns: int, ctime_ns: int, now_ns: int) -> bool:
    """Whether a change after `now_ns` (wall clock) would show: the stamps are old enough, and not in the future."""
    # An mtime of whole seconds may have been set by anybody; the ctime is the kernel's own.
    age = TRUSTED_AGE_NS if ctime_ns % _COARSE_NS else _COARSE_AGE_NS
    return max(mtime_ns, ctime_ns) + age <= now_ns


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """One state of one file. Times are nanoseconds since 1970; `born_ns` is 0 where the file system does not tell.

    `filesystem` is statfs(2)'s f_fsid, which outlives a reboot and tells btrfs subvolumes apart; of a file in a
    snapshot it is that of the file system that the snapshot was taken of.
    """

    filesystem: int
    inode: int
    born_ns: int
    size: int
    mtime_ns: int
    ctime_ns: int

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change after `now_ns` (wall clock) would show."""
        return are_settled(self.mtime_ns, self.ctime_ns, now_ns)

    def to_json(self) -> list[Any]:
        return [self.filesystem, self.inode, self.born_ns, self.size, self.mtime_ns, self.ctime_ns]

    @classmethod
    def from_json(cls, data: list[Any]) -> FileIdentity:
        return cls(*data)
