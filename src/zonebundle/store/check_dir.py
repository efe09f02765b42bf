"""The steps of checking one store dir.

Nothing is changed, and an agent may run beside: what is missed is looked for again, because bundles are deleted and
segments removed meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from zonebundle.model.ids import decode_zone_name, encode_zone_name
from zonebundle.model.manifest import Entry
from zonebundle.model.paths import printable
from zonebundle.store.bundle import DELETED, FRAME, MANIFEST, segments_in
from zonebundle.store.check_bundle import Fault, find_faults
from zonebundle.store.check_segments import PieceCheck, Place, SegmentTable
from zonebundle.store.failure import store_errors
from zonebundle.store.problem import Kind, Problem, problem
from zonebundle.store.reader import SEGMENTS, StoreReader, is_bundle_id

Progress = Callable[[int, int], None]
"""Called with the number of segments and of bundles that were looked at."""

# A bundle committed while others were looked at uses segments too; who seals faster than this is looked at next time.
_ROUNDS = 5


class StoreCheck:
    """The steps of one check, in the order of its methods: the segments come first. One thread at a time."""

    def __init__(self, reader: StoreReader, *, deep: bool = False, progress: Progress | None = None) -> None:
        self._reader = reader
        self.table = SegmentTable(reader.segments, str(reader.directory / SEGMENTS))
        self._pieces = PieceCheck(reader.segments, self.table, deep=deep)
        self._progress = progress or (lambda segments, bundles: None)
        self._checked: set[Path] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pieces.forget()

    def segments(self) -> Iterator[Problem]:
        """Read every segment."""
        for seen in self.table.read(lambda: self._progress(len(self.table), 0)):
            kind = Kind.SEGMENT if seen.digest else Kind.FOREIGN
            yield problem(kind, Path(seen.path), seen.what)

    def bundles(self) -> Iterator[Problem]:
        """Look at every bundle, and at those that are committed meanwhile."""
        for _ in range(_ROUNDS):
            before = len(self._checked)
            for directory in self.committed():
                if directory not in self._checked:
                    yield from self.bundle(directory)
            if len(self._checked) == before:
                return

    def committed(self) -> Iterator[Path]:
        """The directory of every bundle, damaged or not."""
        for directory in self._reader.directories():
            if _is_zone(directory.parent) and _is_directory(directory) and is_committed(directory):
                yield directory
                self._checked.add(directory)
                self._progress(len(self.table), len(self._checked))

    def bundle(self, directory: Path) -> list[Problem]:
        """What is wrong with one bundle; nothing if it is deleted meanwhile."""
        identity = identify(directory)
        faults, tally = self._look(directory, identity)
        if tally.missing:
            # Perhaps a clean-up has put them back, or the bundle is deleted.
            faults, tally = self._look(directory, identity)
        if faults:
            self._mark_used(directory)
        if not is_committed(directory):
            return []
        problems = [problem(_KINDS[fault.name], directory / fault.name, fault.what, identity) for fault in faults]
        return problems + tally.problems(directory, identity, self._reader)

    def debris(self) -> Iterator[Problem]:
        """What lies below `bundles/` and is no bundle."""
        for zone in sorted(self._reader.zones()):
            if not _is_zone(zone):
                if os.path.lexists(zone):
                    yield problem(Kind.FOREIGN, zone, "is no directory of a zone's bundles")
                continue
            for directory in sorted(_list(zone)):
                if not is_bundle_id(directory.name) or not _is_directory(directory):
                    if os.path.lexists(directory):
                        yield problem(Kind.FOREIGN, directory, "is no bundle")
                else:
                    yield from _look_into(directory)

    def unused(self) -> Iterator[Problem]:
        """The whole segments that no bundle uses."""
        for path in self.table.unused():
            yield problem(Kind.UNUSED, Path(path), "is used by no bundle; the next clean-up removes it")

    def _look(self, directory: Path, identity: tuple[str, str]) -> tuple[list[Fault], _Tally]:
        self._pieces.forget()
        tally = _Tally(self._pieces, self.table)
        try:
            faults = list(find_faults(directory, *identity, on_entry=tally.count))
        except FileNotFoundError:
            faults = []
        return faults, tally

    def _mark_used(self, directory: Path) -> None:
        # Whatever can still be read there must not be called unused.
        with contextlib.suppress(OSError):
            for digest in segments_in(directory / MANIFEST):
                self.table.mark_used(digest)


class _Tally:
    """Counts the pieces of one bundle that are not where they should be."""

    def __init__(self, pieces: PieceCheck, table: SegmentTable) -> None:
        self._pieces = pieces
        self._table = table
        self._counts = dict.fromkeys(Place, 0)
        self._first: dict[Place, str] = {}
        self._is_set_aside = False

    @property
    def missing(self) -> int:
        """The pieces whose segment is not there."""
        return self._counts[Place.MISSING]

    def count(self, entry: Entry) -> None:
        """Look for the pieces of an entry."""
        for piece in entry.pieces:
            place = self._pieces.look(piece)
            if place is Place.GOOD:
                continue
            if place is Place.MISSING and self._table.is_set_aside(piece.segment):
                self._is_set_aside = True
                continue
            self._counts[place] += 1
            self._first.setdefault(place, printable(entry.path) if place is Place.OTHER else piece.segment)

    def problems(self, directory: Path, identity: tuple[str, str], reader: StoreReader) -> list[Problem]:
        """One for each way in which pieces are not there."""
        found = []
        if self.missing:
            path = Path(reader.segments.path(self._first[Place.MISSING]))
            what = f"is missing; the bundle has {self._told(Place.MISSING)} in missing segments"
            found.append(problem(Kind.MISSING, path, what, identity))
        if self._counts[Place.DAMAGED]:
            what = f"has {self._told(Place.DAMAGED)} in damaged segments"
            found.append(problem(Kind.AFFECTED, directory, what, identity))
        if self._counts[Place.OTHER]:
            what = f"tells of {self._told(Place.OTHER)} that is not in its segment, first of {self._first[Place.OTHER]}"
            found.append(problem(Kind.PIECE, directory / MANIFEST, what, identity))
        if self._is_set_aside:
            what = "has segments that a clean-up has set aside; it puts them back"
            found.append(problem(Kind.UNFINISHED, directory, what, identity))
        return found

    def _told(self, place: Place) -> str:
        count = self._counts[place]
        return f"{count} piece{'s' if count > 1 else ''} of logs"


_KINDS = {MANIFEST: Kind.MANIFEST, FRAME: Kind.FRAME}


def identify(directory: Path) -> tuple[str, str]:
    """Zone and ID of the bundle that has its place in `directory`."""
    return decode_zone_name(directory.parent.name), directory.name


def is_committed(directory: Path) -> bool:
    """Whether there is a bundle in `directory`, damaged or not."""
    return os.path.lexists(directory / MANIFEST)


def _look_into(directory: Path) -> Iterator[Problem]:
    identity = identify(directory)
    files = sorted(_list(directory))
    if is_committed(directory):
        for path in files:
            # One of a draft that is committed by now is gone.
            if path.name not in (MANIFEST, FRAME) and os.path.lexists(path):
                yield problem(Kind.FOREIGN, path, "is no file of a bundle", identity)
    elif (directory / DELETED).exists():
        what = "is deleted in part; the agent ends that, at its next start at the latest"
        yield problem(Kind.UNFINISHED, directory, what, identity)
    elif directory.exists():
        what = "has no manifest: it is being written, or was left by a crash; the agent's next start removes it then"
        yield problem(Kind.UNFINISHED, directory, what, identity)


def _is_zone(path: Path) -> bool:
    return _is_directory(path) and encode_zone_name(decode_zone_name(path.name)) == path.name


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _list(directory: Path) -> list[Path]:
    with store_errors(f"listing {directory}"):
        try:
            return list(directory.iterdir())
        except FileNotFoundError:
            return []
