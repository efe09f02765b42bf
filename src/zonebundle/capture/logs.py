"""Where a zone's logs are: its log trees, cut at mounts and opened before the zone goes away."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from zonebundle.errors import HostError, OutsideRootError
from zonebundle.host import proc
from zonebundle.host.files import open_directory_beneath, open_root
from zonebundle.host.mounts import Mount, mount_id_of, mounts_below, read_mounts
from zonebundle.model.globs import static_prefix
from zonebundle.model.paths import printable
from zonebundle.model.report import Gap
from zonebundle.model.zone import LogTree
from zonebundle.snapshots.base import OpenTree

# Kernel interfaces, not storage: nothing in them is a log, and some block or have effects when read.
_PSEUDO = frozenset(
    [
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "devtmpfs",
        "efivarfs",
        "fusectl",
        "hugetlbfs",
        "mqueue",
        "nsfs",
        "proc",
        "pstore",
        "rpc_pipefs",
        "securityfs",
        "selinuxfs",
        "sysfs",
        "tracefs",
    ]
)


@dataclass(frozen=True, slots=True)
class OpenLogs:
    """The opened directories and what could not be opened."""

    trees: list[OpenTree]
    gaps: list[Gap]

    def close(self) -> None:
        for tree in self.trees:
            os.close(tree.descriptor)


def open_logs(trees: Iterable[LogTree]) -> OpenLogs:
    """Open the directories that the trees' patterns name, each mount below them explicitly.

    A descriptor outlives private mounts and memory file systems, which are gone when the zone has stopped. What does
    not exist is no gap. May block on a hung file system: run it in a thread that can be abandoned.
    """
    opened = OpenLogs([], [])
    mounts = [mount for mount in read_mounts() if mount.kind not in _PSEUDO]
    for tree in trees:
        try:
            root = _open_tree(tree)
        except FileNotFoundError:
            continue
        except (OSError, HostError) as error:
            opened.gaps.append(Gap(f"logs/{tree.source}", f"{printable(tree.path)} cannot be opened: {error}"))
            continue
        try:
            _open_parts(tree, root, [] if tree.via else mounts_below(tree.path, mounts), opened)
        finally:
            os.close(root)
    return opened


def _open_tree(tree: LogTree) -> int:
    if tree.via is None:
        return open_root(tree.path)
    # Through the process's root the zone's own mounts are seen; the path below it is resolved without links.
    root = os.open(f"/proc/{tree.via.pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not proc.is_alive(tree.via):
            raise OutsideRootError(f"process {tree.via.pid}, through which it is reached, is gone")
        return open_directory_beneath(root, tree.path.strip("/"), cross_mounts=True)
    finally:
        os.close(root)


def _open_parts(tree: LogTree, root: int, mounts: list[Mount], opened: OpenLogs) -> None:
    below = {os.path.relpath(mount.point, tree.path): mount for mount in mounts}
    for prefix in _outermost(_directories(tree)):
        inside = [point for point in below if not prefix or point.startswith(prefix + "/")]
        for directory in [prefix, *inside]:
            above = max((p for p in below if directory == p or directory.startswith(p + "/")), key=len, default=None)
            mount = below[above] if above is not None else None
            try:
                descriptor = open_directory_beneath(root, directory, cross_mounts=mount is not None)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, HostError) as error:
                opened.gaps.append(Gap(f"logs/{tree.source}/{printable(directory)}", str(error)))
                continue
            if mount is not None and mount_id_of(descriptor) != mount.id:
                os.close(descriptor)
                opened.gaps.append(Gap(f"logs/{tree.source}/{printable(directory)}", "its mount changed meanwhile"))
                continue
            path = os.path.join(tree.path, directory) if directory else tree.path
            if tree.via is not None:
                # Relative, so that nobody takes it for a place on the host, where another directory may have that name.
                path = path.lstrip("/")
            prefix_in_source = "/".join(part for part in (tree.prefix, directory) if part)
            opened.trees.append(OpenTree(replace(tree, path=path, prefix=prefix_in_source), descriptor))


def _directories(tree: LogTree) -> Iterator[str]:
    """The directories below the tree's own, which is "", in which its patterns can match at all."""
    for pattern in tree.patterns:
        prefix = static_prefix(pattern)
        if not prefix or f"{tree.prefix}/".startswith(f"{prefix}/"):
            yield ""
        elif not tree.prefix or prefix.startswith(f"{tree.prefix}/"):
            yield prefix.removeprefix(tree.prefix).strip("/")


def _outermost(prefixes: Iterable[str]) -> list[str]:
    """The prefixes that no other one contains: what is below an opened directory is walked from there."""
    kept: list[str] = []
    for prefix in sorted(set(prefixes), key=len):
        if not any(prefix == other or not other or prefix.startswith(other + "/") for other in kept):
            kept.append(prefix)
    return kept
