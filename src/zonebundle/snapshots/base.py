"""What the snapshot kinds have in common: the words of a choice, and trees that are held open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from zonebundle.model.paths import printable
from zonebundle.model.zone import LogTree


class Kind(StrEnum):
    """How the logs of a directory are kept, best first. ZFS will come before all of these."""

    BTRFS = "btrfs"
    REFLINK = "reflink"
    HARDLINK = "hardlink"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class OpenTree:
    """A log tree with its directory held open, which outlives private mounts and the zone itself.

    `descriptor` is a directory descriptor of `tree.path`; whoever opened it closes it. `filesystem` is what identities
    of its files name, None if nobody has asked yet.
    """

    tree: LogTree
    descriptor: int
    filesystem: int | None = None


@dataclass(frozen=True, slots=True)
class StagingRules:
    """Where staging directories may be.

    `configured` maps a mount point to the operator's staging directory for it, `state_dir` is the agent's own, and
    below `zone_roots` nothing of ours is ever put: a zone could reach it.
    """

    configured: Mapping[str, str] = field(default_factory=dict)
    state_dir: str = ""
    zone_roots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found to work for a log directory.

    `staging` is the staging directory on the logs' file system, None where there is none and logs are copied into the
    spool. `group` is the key by which captures share a btrfs snapshot, and `subpath` the directory's path in that
    subvolume and so in its snapshot (empty: its top). `warning` says why it is only a copy.
    """

    kind: Kind
    staging: str | None = None
    group: str | None = None
    subpath: str = ""
    warning: str = ""

    def without_snapshot(self) -> Choice:
        """The next best thing where the btrfs snapshot itself failed: reflinks work on every btrfs."""
        return replace(self, kind=Kind.REFLINK, group=None, subpath="") if self.kind is Kind.BTRFS else self


class KnownFile(Protocol):
    """A state of a file (size, mtime, ctime), and the pieces in the store that hold it, in JSON."""

    @property
    def state(self) -> tuple[int, int, int]: ...

    @property
    def pieces_json(self) -> str: ...


class KnownFiles(Protocol):
    """What is in the store already: a hint, that is asked without waiting, and may know nothing."""

    def known(self, filesystem: int, inodes: Sequence[int]) -> Mapping[int, KnownFile]:
        """By inode, what was seen of these files of one file system; raises nothing."""


def log_name(tree: LogTree, path: str) -> str:
    """How a gap or a step calls a log: its place in the bundle, safe to print."""
    return printable("/".join(part for part in ("logs", tree.source, tree.prefix, path) if part))


def path_in_source(tree: LogTree, path: str) -> str:
    """The path of a log relative to its source, of its path relative to its tree."""
    return f"{tree.prefix}/{path}" if tree.prefix and path else tree.prefix or path
