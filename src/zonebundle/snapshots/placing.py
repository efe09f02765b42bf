"""Where the logs of one staging are put: into its area, in the best way that works, or beside the record."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zonebundle.errors import SnapshotError
from zonebundle.host.files import NO_SPACE
from zonebundle.model.record import Part
from zonebundle.model.report import Outcome, Step
from zonebundle.snapshots.base import Kind
from zonebundle.snapshots.place import AreaFiles, Placed, is_unwritten
from zonebundle.snapshots.tree import Tree

# Where no more than this (in bytes) has to be copied, and nothing linked, an area costs more than the copies.
LITTLE: Final = 256 << 10

_NEVER_WORKS = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS})

# A directory that there is already, and its number among the record's areas.
Near = tuple[Path, int]


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many bytes are copied of one log, how many are kept of one; `is_late` says that time is up."""

    copy: int
    file: int
    is_late: Callable[[], bool]


class Placing:
    """Puts open logs into the area, which is made by `prepare` for the first one, or into `near`, while that is set.

    `number` is the area's in the record. `links_current`: also a current log may be hard linked. `is_refused`: the area
    cannot be used. What does not work is noted in `steps`. Used by one thread.
    """

    def __init__(
        self,
        area: Path,
        number: int,
        bounds: Bounds,
        steps: list[Step],
        *,
        prepare: Callable[[], None] | None,
        near: Near | None,
        links_current: bool,
    ) -> None:
        self._area = area
        self._number = number
        self._bounds = bounds
        self._steps = steps
        self._prepare = prepare
        self._links_current = links_current
        self._files: AreaFiles | None = None
        self._near_files: AreaFiles | None = None
        self.near = near
        self.is_refused = False

    def close(self) -> None:
        for files in (self._files, self._near_files):
            if files is not None:
                files.close()

    def sync(self) -> None:
        """Make what is in the area durable. Raises SnapshotError."""
        if self._files is not None:
            try:
                self._files.sync()
            except OSError as error:
                raise SnapshotError(f"what was staged in {self._area} cannot be made durable: {error}") from None

    def place(self, tree: Tree, source: int, status: os.stat_result, *, is_current: bool) -> Placed:
        """Raises OSError (one of NO_SPACE also where the area cannot be used), RewrittenError."""
        if is_current and (placed := self._copy_near(source, status)) is not None:
            return placed
        files = self._open_area()
        if tree.kind in (Kind.BTRFS, Kind.REFLINK):
            try:
                return files.clone(source, status)
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise
                # Some files cannot be cloned where others can: btrfs refuses those without copy-on-write.
                if error.errno in _NEVER_WORKS:
                    self._fall_back(tree, Kind.HARDLINK, error)
        if tree.kind is not Kind.COPY and (not is_current or self._links_current) and is_unwritten(source):
            try:
                return files.link(source, status)
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise
                # Others are refused one by one: links of other users' files, immutable files, too many links.
                if error.errno in _NEVER_WORKS:
                    self._fall_back(tree, Kind.COPY, error)
        return files.copy(source, status)

    def continues(self, source: int, part: Part) -> bool:
        """Whether the end of what was staged of a log is still there in it: then it only grew since."""
        files = self._files if self._files is not None and part.area == self._number else self._near_files
        return files is not None and files.continues(source, part)

    def _copy_near(self, source: int, status: os.stat_result) -> Placed | None:
        """A copy in the spool entry, None if it does not belong there or does not fit."""
        if self.near is None or status.st_size > LITTLE:
            return None
        try:
            if self._near_files is None:
                self._near_files = self._files_in(*self.near)
            return self._near_files.copy(source, status)
        except OSError:
            # The area may be on another file system.
            self.near = None
            return None

    def _open_area(self) -> AreaFiles:
        if self._files is None:
            try:
                if self._prepare is not None:
                    self._prepare()
                self._files = self._files_in(self._area, self._number)
            except OSError as error:
                self.is_refused = True
                detail = f"{self._area} cannot be used, logs are read behind: {error.strerror}"
                self._steps.append(Step("stage", Outcome.FAIL, detail=detail))
                raise OSError(errno.ENOSPC, "no area") from error
        return self._files

    def _files_in(self, area: Path, number: int) -> AreaFiles:
        bounds = self._bounds
        return AreaFiles(area, number, copy_limit=bounds.copy, file_limit=bounds.file, is_late=bounds.is_late)

    def _fall_back(self, tree: Tree, kind: Kind, error: OSError) -> None:
        detail = f"{tree.kind} does not work here ({error.strerror}), {kind} is tried"
        self._steps.append(Step(tree.name(), Outcome.FAIL, detail=detail))
        tree.kind = kind
