"""The snapshots and staging areas that a record reads from, held open while it is sealed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from zonebundle.errors import SealError
from zonebundle.host import syscalls
from zonebundle.host.files import open_directory_beneath
from zonebundle.model.record import Area, Part

SNAPSHOT = "snapshot"

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_BENEATH = (
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
)


class OpenAreas:
    """Opens files in the areas of one record. A context manager: the directories are closed at its end."""

    def __init__(self, areas: Sequence[Area]) -> None:
        self._areas = areas
        self._directories: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._areas)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for directory in self._directories.values():
            os.close(directory)
        self._directories.clear()

    def may_hold_links(self, number: int) -> bool:
        """Whether an area may hold files by a second name."""
        return self._areas[number].kind == "staged"

    def open(self, part: Part) -> int:
        """A descriptor of the file of a staged part, or of a file in a snapshot; the caller closes it.

        Raises OSError: what is missing here was evidence. Raises SealError if the whole file system seems to be away.
        """
        directory = self._directory(part.area)
        if part.name.startswith(SNAPSHOT):
            # The snapshot is read-only and the walk saw a regular file here; links on the way are still refused.
            return syscalls.openat2(directory, os.fsencode(part.name), _READ, _BENEATH)
        return os.open(part.name, _READ, dir_fd=directory)

    def open_tree(self, number: int, path: str) -> int:
        """A descriptor of a directory in a snapshot, by its path there; the caller closes it.

        Raises OSError, OutsideRootError, SealError as `open`.
        """
        return open_directory_beneath(self._directory(number), f"{SNAPSHOT}/{path}" if path else SNAPSHOT)

    def _directory(self, number: int) -> int:
        known = self._directories.get(number)
        if known is None:
            known = self._directories[number] = self._open_area(Path(self._areas[number].path))
        return known

    def _open_area(self, path: Path) -> int:
        try:
            return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if path.parent.is_dir():
                raise
            raise SealError(
                f"the staging directory {path.parent} is missing: mount its file system, or delete the bundle"
            ) from None
