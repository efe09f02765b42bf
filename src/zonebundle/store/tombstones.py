"""Tombstones: which bundles were deleted, for the store dirs that could not be reached then.

A deletion writes one into the state directory and into every store dir before it removes anything. A dir that comes
back with the bundle still in it, or without the tombstone, must not bring the bundle back.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from zonebundle.errors import StoreError
from zonebundle.host.files import sync_directory, write_durably
from zonebundle.model.ids import check_bundle_id
from zonebundle.store.failure import store_errors
from zonebundle.store.reader import FORMAT, is_bundle_id

TOMBSTONES = "tombstones"

_TEMPORARY = re.compile(r"\.[0-9a-f-]{36}\.(\d+)\.tmp")
_Found = TypeVar("_Found")
_log = structlog.get_logger()


class Reach(Protocol):
    def __call__(self, root: Path, work: Callable[[], _Found]) -> _Found: ...


def _at_once(root: Path, work: Callable[[], _Found]) -> _Found:
    return work()


class Tombstones:
    """The tombstones in several directories, each of which may be gone, full or read-only for a while."""

    def __init__(self, roots: Sequence[Path], reach: Reach = _at_once) -> None:
        """`roots`: the state directory, then the store dirs. `reach` does something in one of them, or StoreError."""
        self._roots = tuple(roots)
        self._reach = reach

    def write(self, bundle_id: str) -> None:
        """Make it durable that the bundle is deleted, wherever that can be written.

        Raises StoreError if that is nowhere, UsageError if it is no bundle ID.
        """
        name = check_bundle_id(bundle_id)
        doing = f"writing a tombstone of bundle {name}"
        written = 0
        failure: StoreError | None = None
        for root in self._roots:
            try:
                with store_errors(doing):
                    written += self._reach(root, partial(_write, root, name, is_state=root == self._roots[0]))
            except StoreError as error:
                failure = failure or error
                _log.warning("a tombstone was not written", bundle_id=name, directory=str(root), reason=str(error))
        if not written:
            raise failure or StoreError(f"{doing} failed: there is no directory for it")

    def has(self, bundle_id: str) -> bool:
        """Whether a tombstone of the bundle is in any of the directories. Raises StoreError if none can be read."""
        name = check_bundle_id(bundle_id)
        return any(self._read(lambda directory: _exists(directory / name)))

    def all(self) -> set[str]:
        """The IDs of all bundles with a tombstone in any of the directories. Raises StoreError if none can be read."""
        return set[str]().union(*self._read(_bundle_ids))

    def remove(self, bundle_id: str) -> None:
        """Forget that the bundle was deleted; one that is not there is fine. Raises StoreError, after trying all."""
        name = check_bundle_id(bundle_id)
        failure: StoreError | None = None
        for root in self._roots:
            path = root / TOMBSTONES / name
            try:
                with store_errors(f"removing {path}"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    self._reach(root, partial(os.unlink, path))
            except StoreError as error:
                failure = failure or error
        if failure:
            raise failure

    def tidy(self) -> None:
        """Remove what writes that were killed have left. Only in the process that writes. Raises no error."""
        for root in self._roots:
            with contextlib.suppress(OSError, StoreError):
                self._reach(root, partial(_tidy, root / TOMBSTONES))

    def _read(self, look: Callable[[Path], _Found]) -> list[_Found]:
        found = []
        failure: StoreError | None = None
        for root in self._roots:
            try:
                with store_errors(f"reading {root / TOMBSTONES}"):
                    found.append(self._reach(root, partial(look, root / TOMBSTONES)))
            except StoreError as error:
                # A disk that fails must not hide what the others know.
                failure = failure or error
                _log.warning("tombstones cannot be read", directory=str(root), reason=str(error))
        if failure and not found:
            raise failure
        return found


def _write(root: Path, name: str, *, is_state: bool) -> bool:
    # A store dir without its format file is not mounted, or not made yet: what is written there hides below the mount,
    # and keeps `Store.open` from taking the directory for an empty one.
    if not is_state and not (root / FORMAT).exists():
        return False
    directory = root / TOMBSTONES
    directory.mkdir(mode=0o700, exist_ok=True)
    write_durably(directory / name, b"")
    # Each time: whoever made the directory may have been stopped before this.
    sync_directory(root)
    return True


def _tidy(directory: Path) -> None:
    for name in os.listdir(directory):
        # Durable writes name their temporary file by the thread.
        thread = _TEMPORARY.fullmatch(name)
        if thread and not os.path.exists(f"/proc/self/task/{thread[1]}"):
            os.unlink(directory / name)


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _bundle_ids(directory: Path) -> set[str]:
    try:
        return {name for name in os.listdir(directory) if is_bundle_id(name)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
