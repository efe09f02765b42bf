"""The cgroup that holds one container and nothing else (cgroups(7)): its processes, also those executed into it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from zonebundle.host import proc
from zonebundle.host.mounts import Mount, read_mounts
from zonebundle.model.zone import ProcessRef
from zonebundle.runtimes.waiting import give_way

# ENODEV: the cgroup was removed. EOPNOTSUPP: a threaded one, whose processes are listed by its parent.
_NOTHING_HERE = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)


def find_cgroup(pid: int, names: Iterable[str]) -> str | None:
    """The directory of the container's own cgroup, given its first process and the names it may have.

    None if no cgroup of that process has such a name, or if others are in it too: this process or the host's first
    one. A container may move its processes further down, so the directory is that of the outermost such name.
    """
    mounts = read_mounts()
    paths = _cgroups_of(pid)
    others = [_cgroups_of("self"), _cgroups_of(1)]
    # The unified hierarchy has the empty name and comes first: it holds every process exactly once.
    for hierarchy in sorted(paths):
        path = _outermost(paths[hierarchy], set(names))
        if path is None or any(_is_at_or_below(other.get(hierarchy, "/"), path) for other in others):
            continue
        for mount in mounts:
            directory = _directory(mount, hierarchy, path)
            if directory is not None and Path(directory, "cgroup.procs").exists():
                return directory
    return None


def cgroup_names(container: str, cgroups_path: str) -> set[str]:
    """The names of a cgroup that is the container's own: its ID, or with systemd a scope that ends in it.

    `cgroups_path` is `linux.cgroupsPath` of its configuration: slice:prefix:name makes prefix-name.scope; runc's own
    prefix is its name. A path that ends in another name may be shared by several containers, and is not used.
    """
    names = {container, f"runc-{container}.scope"}
    match cgroups_path.split(":"):
        case [_, prefix, name] if name == container:
            names |= {f"{prefix}-{name}.scope" if prefix else f"{name}.scope"}
    return names


def _cgroups_of(pid: int | str) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = [line.split(":", 2) for line in lines if line]
    return {hierarchy: path for _, hierarchy, path in fields}


def _outermost(path: str, names: set[str]) -> str | None:
    parts = path.split("/")
    for index, part in enumerate(parts):
        if part == "..":  # outside of this process's cgroup namespace
            return None
        if part in names:
            return "/".join(parts[: index + 1])
    return None


def _is_at_or_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top + "/")


def _directory(mount: Mount, hierarchy: str, path: str) -> str | None:
    # A hierarchy of version 1 is mounted, by custom, on a directory named after its controllers.
    controllers = hierarchy.removeprefix("name=")
    belongs = mount.kind == "cgroup" and mount.point.rpartition("/")[2] == controllers if hierarchy else None
    if not (mount.kind == "cgroup2" if belongs is None else belongs):
        return None
    root = mount.root.rstrip("/")
    return mount.point + path.removeprefix(root) if _is_at_or_below(path, root) else None


class Cgroup:
    """Search for the processes of one cgroup and of those below it.

    Its directory is held open, so that another one made later at the same path is never mistaken for it.
    """

    def __init__(self, directory: str) -> None:
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    async def __call__(self) -> list[ProcessRef]:
        """The cgroup's living processes, none once it has been removed."""
        found: list[ProcessRef] = []
        for parent, _, _ in os.walk(f"/proc/self/fd/{self._descriptor}"):
            for pid in _listed(parent):
                await give_way()
                if process := proc.identify(pid):
                    found.append(process)
        return found


def _listed(directory: str) -> list[int]:
    try:
        return [int(pid) for pid in Path(directory, "cgroup.procs").read_bytes().split()]
    except OSError as error:
        if error.errno in _NOTHING_HERE:
            return []
        raise
