"""Areas: directories of ours beside the logs, that hold a snapshot or staged files until the seal.

An area is `<staging directory>/zb-<installation>-<leader bundle>/` with `owner.json`, the ownership mark, and in it
`snapshot` (a read-only btrfs subvolume) or `files/` (what was staged), or both. It is destroyed only if its name AND
its mark say that this installation made it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from zonebundle.errors import SnapshotError
from zonebundle.host.files import remove_tree, write_all
from zonebundle.model.ids import parse_snapshot_name
from zonebundle.model.record import Area
from zonebundle.snapshots import btrfs
from zonebundle.snapshots.place import FILES

MARK: Final = "owner.json"

_MARK_LIMIT = 4096

Unlinked = Callable[[os.stat_result, os.stat_result], None]


def prepare_area(area: Path, installation: str) -> None:
    """Make the area's directory (0700) and its mark; one that is ours already is fine.

    Nothing is synced: an area that a power cut takes away is missing, and one whose mark it left empty is still ours
    (see `destroy_area`). Raises SnapshotError if the name or the mark is another's, OSError.
    """
    parsed = parse_snapshot_name(area.name)
    if parsed is None or parsed[0] != installation:
        raise SnapshotError(f"{area} is not named like an area of installation {installation}; nothing was made")
    with contextlib.suppress(FileExistsError):
        area.mkdir(mode=0o700)
    descriptor = _open(area)
    try:
        _check_is_private(area, descriptor)
        _mark(area, descriptor, installation)
    finally:
        os.close(descriptor)


def _mark(area: Path, descriptor: int, installation: str) -> None:
    try:
        mark = os.open(MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=descriptor)
    except FileExistsError:
        _check_mark(area, descriptor, installation)
        return
    try:
        write_all(mark, json.dumps({"installation": installation}).encode("ascii"))
    finally:
        os.close(mark)


def list_areas(staging: Path, installation: str) -> Iterator[Area]:
    """The areas of this installation in a staging directory, by name and mark; a missing directory has none.

    Raises OSError if the directory cannot be read.
    """
    try:
        names = sorted(os.listdir(staging))
    except FileNotFoundError:
        return
    for name in names:
        parsed = parse_snapshot_name(name)
        if parsed is None or parsed[0] != installation:
            continue
        path = staging / name
        with contextlib.suppress(OSError, SnapshotError):
            descriptor = _open(path)
            try:
                _check_is_ours(path, descriptor, installation)
                has_snapshot = btrfs.SNAPSHOT in os.listdir(descriptor)
            finally:
                os.close(descriptor)
            yield Area("btrfs" if has_snapshot else "staged", str(path), parsed[1])


def destroy_area(area: Area, installation: str, unlinked: Unlinked | None = None) -> None:
    """Remove an area with all it holds; a missing one is fine. May be repeated at any point.

    Raises SnapshotError, with the reason, if it is not ours by name (installation and leader) and by mark, or if it
    cannot be removed. A mark that is empty counts: a power cut may leave it so, and the name is ours, in a directory
    that only we can write. Files are removed one by one; a hard-linked log loses our name for it, not its own, and
    `unlinked` is told of it: the status before, and after, which differs in ctime.
    """
    if area.kind == "entry":
        # The spool entry itself: it goes when nothing is to be sealed from it any more.
        return
    path = Path(area.path)
    if parse_snapshot_name(path.name) != (installation, area.leader):
        raise SnapshotError(
            f"{path} is not destroyed: it is not named for installation {installation} and bundle {area.leader}"
        )
    try:
        descriptor = _open(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SnapshotError(f"{path} is not destroyed: it cannot be opened: {error.strerror}") from None
    try:
        _check_is_ours(path, descriptor, installation)
        if unlinked is not None:
            _unlink_links(descriptor, unlinked)
        _empty(path, descriptor)
    except OSError as error:
        raise SnapshotError(f"{path} cannot be removed: {error}; remove it by hand") from None
    finally:
        os.close(descriptor)
    try:
        path.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise SnapshotError(f"{path} cannot be removed: {error.strerror}; remove it by hand") from None


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _check_is_ours(path: Path, descriptor: int, installation: str) -> None:
    _check_is_private(path, descriptor)
    # A crash between mkdir and the mark leaves an empty directory: there is nothing in it that could be another's.
    if os.listdir(descriptor):
        _check_mark(path, descriptor, installation)


def _check_is_private(path: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise SnapshotError(f"{path} is not ours: it belongs to user {status.st_uid}, mode {status.st_mode & 0o7777:o}")


def _check_mark(path: Path, descriptor: int, installation: str) -> None:
    try:
        mark = os.open(MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError as error:
        raise SnapshotError(f"{path} is not ours: it has no readable mark {MARK}: {error.strerror}") from None
    try:
        is_regular = stat.S_ISREG(os.fstat(mark).st_mode)
        text = os.read(mark, _MARK_LIMIT) if is_regular else b"?"
    finally:
        os.close(mark)
    try:
        owner = json.loads(text) if text else {"installation": installation}
    except ValueError:
        owner = None
    if not isinstance(owner, dict) or owner.get("installation") != installation:
        raise SnapshotError(f"{path} is not ours: its mark {MARK} does not name installation {installation}")


def _unlink_links(area: int, unlinked: Unlinked) -> None:
    try:
        files = os.open(FILES, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=area)
    except FileNotFoundError:
        return
    try:
        for name in os.listdir(files):
            log = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=files)
            try:
                before = os.fstat(log)
                if stat.S_ISREG(before.st_mode) and before.st_nlink > 1:
                    os.unlink(name, dir_fd=files)
                    unlinked(before, os.fstat(log))
            finally:
                os.close(log)
    finally:
        os.close(files)


def _empty(path: Path, descriptor: int) -> None:
    """Remove what is in an area, the mark last: what is left after a crash can still be told to be ours."""
    for name in os.listdir(descriptor):
        if name == MARK:
            continue
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=descriptor)
        elif not (btrfs.is_subvolume_root(status) and _destroy_subvolume(descriptor, name)):
            remove_tree(path / name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(MARK, dir_fd=descriptor)


def _destroy_subvolume(directory: int, name: str) -> bool:
    """Destroy a snapshot; False if it is none after all: on other file systems any directory may have its number."""
    try:
        btrfs.destroy_subvolume(directory, name)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return False
        raise
    return True
