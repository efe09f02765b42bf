"""The mount table, as the kernel tells it (proc(5), /proc/[pid]/mountinfo)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount: its ID, mount point, file system type, the directory of the file system that is its root, its source."""

    id: int
    point: str
    kind: str
    root: str
    source: str
    device: str
    read_only: bool


def read_mounts(pid: int | str = "self") -> list[Mount]:
    """Every mount that the process sees, in the order of mounting."""
    return list(_parse_all(Path(f"/proc/{pid}/mountinfo").read_bytes()))


# Every hold looks, and the table has hundreds of lines that seldom change.
@functools.lru_cache(maxsize=4)
def _parse_all(table: bytes) -> tuple[Mount, ...]:
    # Not splitlines: of the line ends it knows the kernel escapes only one, and a mount point may be named with others.
    return tuple(_parse(line) for line in table.decode("utf-8", "surrogateescape").split("\n") if line)


def _parse(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    fields = left.split(" ")
    kind, source, _options = [*right.split(" "), "", ""][:3]
    return Mount(
        id=int(fields[0]),
        point=_unescape(fields[4]),
        kind=kind,
        root=_unescape(fields[3]),
        source=_unescape(source),
        device=fields[2],
        read_only="ro" in fields[5].split(","),
    )


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text


def mount_id_of(descriptor: int) -> int:
    """The ID of the mount through which a descriptor was opened."""
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/fdinfo/{descriptor} names no mount")


def mount_of(path: str, mounts: list[Mount]) -> Mount:
    """The mount that an absolute, normalised path lies on, the latest where several are stacked."""
    best = None
    for mount in mounts:
        inside = path == mount.point or path.startswith(mount.point.rstrip("/") + "/")
        if inside and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    if best is None:
        raise OSError(f"no mount holds {path}")
    return best


def mounts_below(path: str, mounts: list[Mount]) -> list[Mount]:
    """The mounts strictly below an absolute, normalised path, each mount point once (the topmost)."""
    prefix = path.rstrip("/") + "/"
    inside = [mount for mount in mounts if mount.point.startswith(prefix) and mount.point != prefix]
    return list({mount.point: mount for mount in inside}.values())
