"""An OCI bundle's config.json (OCI runtime specification 1.0, config.md): where the container's logs are on the host.

The file is the operator's or an engine's, not the container's; it is bounded and checked all the same.
"""

from __future__ import annotations

import json
import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zonebundle.errors import RuntimeFailedError
from zonebundle.model.globs import matches_any, static_prefix
from zonebundle.model.zone import LogTree, ProcessRef

_LARGEST = 4 << 20
_MOST_MOUNTS = 4096
_NO_FILES = frozenset(
    [
        "proc",
        "sysfs",
        "cgroup",
        "cgroup2",
        "devpts",
        "devtmpfs",
        "mqueue",
        "securityfs",
        "debugfs",
        "tracefs",
        "bpf",
        "pstore",
        "binfmt_misc",
    ]
)
_SPECIAL = ("proc", "sys", "dev")


@dataclass(frozen=True, slots=True)
class OciMount:
    """A mount of a container. `destination` is relative to its root, normalised; `source` is absolute for a bind."""

    destination: str
    kind: str
    source: str
    is_bind: bool


@dataclass(frozen=True, slots=True)
class OciConfig:
    """What is needed of a config.json. `root` is the root file system's directory, absolute."""

    root: str
    mounts: tuple[OciMount, ...]
    cgroups_path: str


def read_config(bundle: str) -> OciConfig:
    """Read `<bundle>/config.json`. Raises RuntimeFailedError naming the file and what is wrong with it."""
    path = Path(bundle, "config.json")
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError(f"larger than {_LARGEST} bytes")
        return _parse(json.loads(data), bundle)
    except (OSError, ValueError, RecursionError) as error:
        raise RuntimeFailedError(f"{path} cannot be used: {error}") from error


def _parse(data: object, bundle: str) -> OciConfig:
    config = _dict(data, "the whole")
    mounts = config.get("mounts") or []
    if not isinstance(mounts, list) or len(mounts) > _MOST_MOUNTS:
        raise ValueError(f"'mounts' is not a list of at most {_MOST_MOUNTS}")
    linux = _dict(config.get("linux") or {}, "'linux'")
    return OciConfig(
        root=_absolute(bundle, _text(_dict(config.get("root"), "'root'"), "path")),
        mounts=tuple(_parse_mount(_dict(mount, "a mount"), bundle) for mount in mounts),
        cgroups_path=_text(linux, "cgroupsPath", ""),
    )


def _parse_mount(mount: dict[str, Any], bundle: str) -> OciMount:
    options = mount.get("options") or []
    kind, source = _text(mount, "type", ""), _text(mount, "source", "")
    is_bind = kind == "bind" or (isinstance(options, list) and bool({"bind", "rbind"}.intersection(map(str, options))))
    return OciMount(
        # A relative one is taken from the root, as runtimes do.
        destination=posixpath.normpath("/" + _text(mount, "destination")).strip("/"),
        kind=kind,
        source=_absolute(bundle, source) if is_bind else source,
        is_bind=is_bind,
    )


def _dict(data: object, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{what} is not an object")  # noqa: TRY004 - one kind of error for all that is wrong
    return data


def _text(data: dict[str, Any], key: str, default: str | None = None) -> str:
    value = data.get(key, default)
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"'{key}' is not a text")
    return value


def _absolute(bundle: str, path: str) -> str:
    return os.path.normpath(os.path.join(bundle, path))


def log_trees(config: OciConfig, patterns: tuple[str, ...], init: ProcessRef | None) -> tuple[LogTree, ...]:
    """Where files that `patterns` choose (relative to the container's root) can be: the root and mounts over it.

    A bind mount is looked for in its source on the host; another mount (tmpfs) through the container's first process,
    and nowhere without one. What a mount hides is left out. May block on a source that hangs.
    """
    layers = [OciMount("", "", config.root, True), *config.mounts]
    trees: list[LogTree] = []
    for number, layer in enumerate(layers):
        later = [mount.destination for mount in layers[number + 1 :]]
        seen = tuple(
            pattern
            for pattern in patterns
            if _meet(layer.destination, static_prefix(pattern))
            and not any(_covers(cover, static_prefix(pattern)) or _covers(cover, layer.destination) for cover in later)
        )
        if seen and not _is_special(layer):
            trees += _trees_of(layer, seen, init)
    return tuple(trees)


def _trees_of(layer: OciMount, patterns: tuple[str, ...], init: ProcessRef | None) -> list[LogTree]:
    if not layer.is_bind:
        if init is None:
            return []
        return [LogTree("zone", layer.destination, patterns, prefix=layer.destination, via=init)]
    if not layer.destination:
        return [LogTree("zone", layer.source, patterns)]
    try:
        is_file = stat.S_ISREG(os.stat(layer.source).st_mode)
    except OSError:
        is_file = False  # whoever opens it will say what is wrong
    if not is_file:
        return [LogTree("zone", layer.source, patterns, prefix=layer.destination)]
    if not matches_any(layer.destination, patterns):
        return []
    directory, name = os.path.split(layer.source)
    prefix, shown = posixpath.split(layer.destination)
    if name == shown:
        return [LogTree("zone", directory, (_literal(layer.destination),), prefix=prefix)]
    # A single file under another name: no directory shows it so, but the attempt to open it as one becomes a gap.
    return [LogTree("zone", layer.source, (_literal(layer.destination),), prefix=layer.destination)]


def _literal(path: str) -> str:
    """A glob that matches this path only."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)


def _is_special(layer: OciMount) -> bool:
    return layer.kind in _NO_FILES or layer.destination.split("/")[0] in _SPECIAL


def _covers(top: str, path: str) -> bool:
    """Whether `path` is at or below `top`; everything is below the root, which is ''."""
    return not top or path == top or path.startswith(top + "/")


def _meet(one: str, other: str) -> bool:
    return _covers(one, other) or _covers(other, one)
