"""Which snapshot kind a log directory gets, and which staging directory: found by trying, and remembered.

What a file system can do is not read from its name: XFS may be made without reflinks, a user may snapshot a subvolume
and then not delete it. So each thing is tried once in the staging directory. The memory is plain module state without
a lock: filled in a parent process, it is there in the workers that are forked from it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from zonebundle.errors import ZoneBundleError
from zonebundle.host.files import sync_directory, write_all
from zonebundle.host.mounts import Mount, mount_id_of, mount_of, read_mounts
from zonebundle.model.paths import printable
from zonebundle.snapshots import btrfs
from zonebundle.snapshots.base import Choice, Kind, StagingRules
from zonebundle.snapshots.place import FICLONE, is_unwritten

DIRECTORY: Final = ".zone-bundle"
BELOW_STATE: Final = "staging"

# What was found may have been changed: what did not work, where a link leads. It is tried again after so many seconds.
_RETRY = 60.0
_MOST = 4096
_TRIAL = ".try-"
_SCRATCH = ("", ".2")
# In these the area would vanish with the zone, or linking copies the whole file (overlay: 0.9 s for 300 MB).
_MEMORY = frozenset({"tmpfs", "ramfs"})
_NO_LINKS = frozenset({"overlay"})

_Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Remembered:
    rules: StagingRules
    choice: Choice
    staging: _Identity | None
    expires: float

    def holds(self, rules: StagingRules) -> bool:
        if self.rules is not rules and self.rules != rules:
            return False
        if self.choice.staging is None:
            return time.monotonic() < self.expires
        try:
            return _identity(os.stat(self.choice.staging, follow_symlinks=False)) == self.staging
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class _Staging:
    """A staging directory that may be used, and what was found to work in it."""

    path: str
    identity: _Identity
    is_same_mount: bool
    kinds: frozenset[Kind]


_choices: dict[tuple[str, int, int], _Remembered] = {}
_kinds: dict[_Identity, tuple[str, frozenset[Kind]]] = {}
# Real paths of the zones' roots, and until when they are taken for that.
_roots: dict[tuple[str, ...], tuple[frozenset[str], float]] = {}


def choose(descriptor: int, path: str, rules: StagingRules) -> Choice:
    """How the logs of a directory are to be kept; `path` is where it was opened, on the host or in a namespace.

    Staging directories are looked for in this order: the one configured for the mount, `<state-dir>/staging`,
    `<mount point>/.zone-bundle`, and `.zone-bundle` in the nearest directory above `path`; always on the file system
    of the logs and outside every zone's root. The first that is ours, or can be made (0700), counts. In memory file
    systems, and where nothing works, it is `copy`, with a warning that says why.

    About 10 µs when remembered, some milliseconds when it has to be tried. Raises OSError only for a descriptor that
    is not open. May block on a hung file system.
    """
    status = os.fstat(descriptor)
    key = (path, status.st_dev, status.st_ino)
    known = _choices.get(key)
    if known is None or not known.holds(rules):
        try:
            choice, identity = _find(descriptor, path, status, rules)
        except (OSError, ZoneBundleError) as error:
            choice, identity = Choice(Kind.COPY, warning=_warning(path, str(error))), None
        if len(_choices) >= _MOST:
            _choices.clear()
        known = _choices[key] = _Remembered(rules, choice, identity, time.monotonic() + _RETRY)
    return _adapt(known.choice, descriptor) if known.choice.kind is Kind.BTRFS else known.choice


def _adapt(choice: Choice, descriptor: int) -> Choice:
    """A choice for a snapshot, with what the zone can change at any time: nested subvolumes, the directory's path."""
    try:
        # A nested subvolume would be empty in the snapshot; staging walks into it.
        if btrfs.holds_subvolumes(descriptor):
            return choice.without_snapshot()
        path = btrfs.find_path(descriptor)
    except (OSError, ZoneBundleError):
        return choice.without_snapshot()
    return choice if path == choice.subpath else replace(choice, subpath=path)


def forget() -> None:
    """Try everything again: for the doctor, and after the configuration has changed."""
    _choices.clear()
    _kinds.clear()
    _roots.clear()


def _find(descriptor: int, path: str, status: os.stat_result, rules: StagingRules) -> tuple[Choice, _Identity | None]:
    mounts = read_mounts()
    mount_id = mount_id_of(descriptor)
    # None: a mount of another namespace, where `path` means nothing here.
    mount = next((mount for mount in mounts if mount.id == mount_id), None)
    if mount is not None and mount.kind in _MEMORY:
        return Choice(Kind.COPY, warning=_warning(path, f"{mount.kind} does not outlive the zone")), None
    device = mount.device if mount is not None else f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    reasons: list[str] = []
    for candidate in _candidates(path, mount, rules):
        try:
            staging = _claim(candidate, mounts, mount_id, device, rules)
        except OSError as error:
            reasons.append(f"{candidate}: {error.strerror}")
            continue
        if Kind.BTRFS in staging.kinds:
            with contextlib.suppress(OSError, ZoneBundleError):
                place = btrfs.find_place(descriptor)
                return Choice(Kind.BTRFS, staging.path, place.key, place.path), staging.identity
        if Kind.REFLINK in staging.kinds:
            return Choice(Kind.REFLINK, staging.path), staging.identity
        if Kind.HARDLINK in staging.kinds and staging.is_same_mount and mount is not None:
            if mount.kind not in _NO_LINKS:
                return Choice(Kind.HARDLINK, staging.path), staging.identity
            reasons.append(f"{candidate}: linking in {mount.kind} copies whole files")
        else:
            reasons.append(f"{candidate}: neither reflinks nor hard links work")
    reason = "; ".join(reasons) or "no directory is outside every zone"
    return Choice(Kind.COPY, warning=_warning(path, reason)), None


def _warning(path: str, reason: str) -> str:
    return (
        f"logs in {printable(path)} are copied while the zone is held, which is slow and bounded "
        f"({printable(reason)}); name a directory on their file system under [staging]"
    )


def _candidates(path: str, mount: Mount | None, rules: StagingRules) -> Iterator[str]:
    if mount is None:
        yield from rules.configured.values()
    elif mount.point in rules.configured:
        yield rules.configured[mount.point]
    if rules.state_dir:
        yield os.path.join(rules.state_dir, BELOW_STATE)
    if mount is None:
        return
    yield os.path.join(mount.point, DIRECTORY)
    above = os.path.dirname(os.path.normpath(path))
    while above != mount.point and above.startswith(mount.point.rstrip("/") + "/"):
        yield os.path.join(above, DIRECTORY)
        above = os.path.dirname(above)


def _claim(candidate: str, mounts: list[Mount], mount_id: int, device: str, rules: StagingRules) -> _Staging:
    """Make sure of a staging directory, and try what works in it. Raises OSError with the reason why it cannot be."""
    parent = os.path.realpath(os.path.dirname(candidate))
    # Looked at before anything is made: on another file system it would be left there unused.
    if mount_of(parent, mounts).device != device and not os.path.ismount(candidate):
        raise _refusal("is on another file system")
    real = os.path.join(parent, os.path.basename(candidate))
    if not _resolved(rules.zone_roots).isdisjoint(_with_parents(real)):
        raise _refusal("is inside the root of a zone")
    if os.path.basename(candidate) == DIRECTORY:
        _check_parent(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(real, 0o700)
        sync_directory(parent)
    descriptor = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise _refusal(
                f"belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, not to us, 700"
            )
        own_mount = mount_id_of(descriptor)
        if next((mount.device for mount in mounts if mount.id == own_mount), None) != device:
            raise _refusal("is on another file system")
        identity = _identity(status)
        known = _kinds.get(identity)
        if known is None or known[0] != device:
            known = (device, _try(descriptor))
            # What failed may have failed for want of space.
            if known[1]:
                _kinds[identity] = known
        return _Staging(real, identity, own_mount == mount_id, known[1])
    finally:
        os.close(descriptor)


def _refusal(reason: str) -> OSError:
    return OSError(errno.EPERM, reason)


def _resolved(roots: tuple[str, ...]) -> frozenset[str]:
    """The real paths of these directories. A host has a thousand, and each directory of each zone asks for all."""
    known = _roots.get(roots)
    if known is None or known[1] < time.monotonic():
        _roots.clear()
        known = _roots[roots] = frozenset(map(os.path.realpath, roots)), time.monotonic() + _RETRY
    return known[0]


def _with_parents(path: str) -> Iterator[str]:
    """A real path and those of all directories that it lies in."""
    yield path
    while path != (path := os.path.dirname(path)):
        yield path


def _check_parent(parent: str) -> None:
    """Whoever may rename in the parent could put another directory in ours' place: only root and we may."""
    status = os.stat(parent)
    is_shared = stat.S_IMODE(status.st_mode) & 0o022 and not status.st_mode & stat.S_ISVTX
    if status.st_uid not in (0, os.geteuid()) or is_shared:
        raise _refusal("others may write in the directory that it would be in")


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _try(directory: int) -> frozenset[Kind]:
    """What works in a staging directory."""
    for name in os.listdir(directory):
        # Left by a trial that was killed; another process may be trying at this moment.
        if name.startswith(_TRIAL) and not os.path.exists(f"/proc/{name.removeprefix(_TRIAL).partition('-')[0]}"):
            _remove_scratch(directory, name)
    works = {
        kind
        for kind, attempt in ((Kind.BTRFS, _try_btrfs), (Kind.REFLINK, _try_clone), (Kind.HARDLINK, _try_link))
        if _works(attempt, directory)
    }
    return frozenset(works)


def _works(attempt: Callable[[int, str], None], directory: int) -> bool:
    name = f"{_TRIAL}{os.getpid()}-{uuid.uuid4().hex}"
    try:
        attempt(directory, name)
    except OSError:
        return False
    finally:
        for suffix in _SCRATCH:
            _remove_scratch(directory, name + suffix)
    return True


def _try_btrfs(directory: int, name: str) -> None:
    # Deleting is tried too: an ordinary user may make a snapshot and not be able to delete it again.
    btrfs.create_subvolume(directory, name)
    btrfs.destroy_subvolume(directory, name)


def _try_clone(directory: int, name: str) -> None:
    source, target = (_create(directory, name + suffix) for suffix in _SCRATCH)
    try:
        write_all(source, bytes(4096))
        fcntl.ioctl(target, FICLONE, source)
    finally:
        os.close(source)
        os.close(target)


def _try_link(directory: int, name: str) -> None:
    first, second = (name + suffix for suffix in _SCRATCH)
    os.close(_create(directory, first))
    source = os.open(first, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.link(f"/proc/self/fd/{source}", second, dst_dir_fd=directory)
        if not is_unwritten(source):
            raise _refusal("whether a file is open for writing cannot be told here")
    finally:
        os.close(source)


def _create(directory: int, name: str) -> int:
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)


def _remove_scratch(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            # An empty subvolume is removed like a directory, by its owner too (Linux 4.18).
            os.rmdir(name, dir_fd=directory)
