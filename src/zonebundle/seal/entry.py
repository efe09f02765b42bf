"""A spool entry as the sealer sees it: the capture record, streamed, and the outputs beside it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from blake3 import blake3

from zonebundle.errors import FormatError, UsageError
from zonebundle.host.files import remove_tree, sync_directory, write_durably
from zonebundle.model.ids import check_bundle_id
from zonebundle.model.manifest import decode_line
from zonebundle.model.metadata import parse_time
from zonebundle.model.record import (
    OUTPUTS_FILE,
    RECORD_FILE,
    Area,
    LogFile,
    Output,
    Part,
    RecordHeader,
    SnapshotTree,
    record_digest,
)
from zonebundle.model.report import Gap, Step
from zonebundle.seal.report import Gaps
from zonebundle.store.bundle import segments_in

T = TypeVar("T")

# Nothing more is to be sealed from an entry with this file: it is done, or was deleted. It may still be needed by
# followers of its snapshot.
_SEALED_MARK = "sealed"
_REMOVED = ".{}.removed"
# A line holds two paths of at most 4 KiB each, escaped, and the parts of one file, or a step's or gap's text.
_LONGEST_LINE = 4 << 20
_BLOCK = 1 << 20
_SIZE = re.compile(rb'"size": ?(\d+)')
_FIRST = re.compile(rb'"parts": ?\[\[(\d+)')
_FILE_LINE = b'{"file":'
_AREA_LINE = b'{"area":'
_FOLLOWERS_LINE = b'{"followers":'
_STAGED_NAME = re.compile(r"files/\d+")


@dataclass(frozen=True, slots=True)
class Record:
    """The capture record but for its log files, which are streamed. `bytes` is what the staged logs come to, about.

    `is_intact`: neither it nor the outputs have changed on the disk since they were written.
    """

    header: RecordHeader
    steps: tuple[Step, ...]
    gaps: Gaps
    outputs: tuple[Output, ...]
    areas: tuple[Area, ...]
    trees: tuple[SnapshotTree, ...]
    bytes: int
    is_intact: bool


class Uses(NamedTuple):
    """The snapshots and staging areas that a record reads from, and the bundles that share those it leads."""

    areas: tuple[Area, ...]
    followers: tuple[str, ...]


class SpoolEntry:
    """`<state-dir>/spool/<bundle-id>/`, the sealer's from the record on until it removes it."""

    def __init__(self, spool: Path, bundle_id: str) -> None:
        self.bundle_id = check_bundle_id(bundle_id)
        self.path = spool / self.bundle_id

    def is_recorded(self) -> bool:
        return (self.path / RECORD_FILE).exists()

    def is_sealed(self) -> bool:
        """Whether nothing is to be sealed from it any more."""
        return (self.path / _SEALED_MARK).exists()

    def mark_sealed(self) -> None:
        """Note, durably, that nothing is to be sealed from it any more."""
        write_durably(self.path / _SEALED_MARK, b"")

    def read_record(self) -> Record:
        """Read everything but the log files; raises FormatError if it is damaged, OSError."""
        header = self.read_header()
        gaps = Gaps()
        steps: list[Step] = []
        outputs: list[Output] = []
        areas: list[Area] = []
        trees: list[SnapshotTree] = []
        takes: dict[str, Callable[[Any], object]] = {
            "step": lambda data: steps.append(Step.from_json(data)),
            "gap": lambda data: gaps.add(Gap.from_json(data)),
            "output": lambda data: outputs.append(Output(**data)),
            "area": lambda data: areas.append(Area(**data)),
            "tree": lambda data: trees.append(SnapshotTree.from_json(data)),
            # Of no concern to the bundle itself, see `uses`.
            "followers": lambda _: None,
        }
        total = 0
        digest = blake3()
        noted = None
        for number, line in self._lines():
            if number > 1:
                digest.update(line)
            else:
                noted = decode_line(line).get("digest")
            if line.startswith(_FILE_LINE):
                # Parsed when its turn comes; here it would only cost time.
                total += _kept_bytes(line)
            elif number > 1:
                self._parse(number, line, lambda data: [takes[kind](value) for kind, value in data.items()])
        is_intact = noted == record_digest(header, digest.digest(), self._outputs_digest())
        if not is_intact:
            # Better a bundle in doubt than none; what it tells is checked at each step.
            gaps.add(Gap("capture record", f"{self.path} has changed on the disk since it was written"))
        return Record(header, tuple(steps), gaps, tuple(outputs), tuple(areas), tuple(trees), total, is_intact)

    def _outputs_digest(self) -> bytes:
        outputs = blake3()
        with contextlib.suppress(FileNotFoundError), (self.path / OUTPUTS_FILE).open("rb") as file:
            while block := file.read(_BLOCK):
                outputs.update(block)
        return outputs.digest()

    def read_header(self) -> RecordHeader:
        """The record's first line. Raises FormatError if it is damaged, OSError."""
        for number, line in self._lines():
            return self._check_header(self._parse(number, line, _header))
        raise FormatError(f"{self.path / RECORD_FILE} is empty: the record is damaged; delete the bundle to go on")

    def _check_header(self, header: RecordHeader) -> RecordHeader:
        if header.metadata.bundle_id != self.bundle_id:
            raise FormatError(f"{self.path / RECORD_FILE} is that of bundle {header.metadata.bundle_id}; put it there")
        return header

    def log_files(self, areas: int) -> Iterator[LogFile]:
        """The log files in the order of the record; `areas` is how many areas it names. Raises as `read_record`."""
        for number, line in self._lines():
            if line.startswith(_FILE_LINE):
                yield self._parse(number, line, lambda data: _checked(LogFile.from_json(data["file"]), areas))

    def uses(self) -> Uses:
        """The areas and followers that the record names, as far as it can be read. Raises OSError.

        Also what a damaged record uses must be kept until its bundle is deleted, and be destroyed then.
        """
        areas: list[Area] = []
        followers: list[str] = []
        with (self.path / RECORD_FILE).open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                if not line.startswith((_AREA_LINE, _FOLLOWERS_LINE)):
                    continue
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, UsageError):
                    data = decode_line(line)
                    if "area" in data:
                        area = Area(**data["area"])
                        check_bundle_id(area.leader)
                        areas.append(area)
                    else:
                        followers.extend(check_bundle_id(follower) for follower in data["followers"])
        return Uses(tuple(areas), tuple(followers))

    def segments(self) -> set[str]:
        """The segments (hex digests) whose pieces the record names; none if it has gone. Raises OSError."""
        try:
            return set(segments_in(self.path / RECORD_FILE))
        except FileNotFoundError:
            return set()

    def open_outputs(self) -> int:
        """A descriptor of the outputs file; the caller closes it."""
        return os.open(self.path / OUTPUTS_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def strip(self) -> None:
        """Remove all but the record and the mark: followers need to know what they follow."""
        for path in list(self.path.iterdir()):
            if path.name not in (RECORD_FILE, _SEALED_MARK):
                if path.is_dir() and not path.is_symlink():
                    remove_tree(path)
                else:
                    path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the entry. First it gets a name that is no bundle's, so that none ever sees half of it."""
        aside = self.path.with_name(_REMOVED.format(self.bundle_id))
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        remove_tree(aside)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with (self.path / RECORD_FILE).open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if not line.endswith(b"\n"):
                    raise self._damaged(number, "it is cut off")
                yield number, line

    def _parse(self, number: int, line: bytes, take: Callable[[Any], T]) -> T:
        try:
            return take(decode_line(line))
        except FormatError:
            raise
        except Exception as error:
            # Whatever a damaged line makes the parsers raise.
            raise self._damaged(number, f"{type(error).__name__}: {error}") from None

    def _damaged(self, number: int, why: str) -> FormatError:
        return FormatError(
            f"{self.path / RECORD_FILE} line {number} cannot be read ({why}): the record is damaged; "
            "restore it, or delete the bundle"
        )


def remove_leftovers(spool: Path) -> None:
    """Finish the removals of entries that a dead sealer had begun."""
    for path in spool.glob(_REMOVED.format("*")):
        remove_tree(path)
    sync_directory(spool)


def _header(data: Any) -> RecordHeader:
    header = RecordHeader.from_json(data)
    parse_time(header.metadata.time_created)
    return header


def _kept_bytes(line: bytes) -> int:
    size, first = _SIZE.search(line), _FIRST.search(line)
    return max(0, int(size[1]) - (int(first[1]) if first else 0)) if size else 0


def _checked(log: LogFile, areas: int) -> LogFile:
    """Parts must be adjacent and end at the size, and lead nowhere but into the areas. Raises ValueError."""
    end = log.first
    for part in log.parts:
        if part.start != end or part.length < 0 or part.offset < 0:
            raise ValueError("its parts are not adjacent")
        if part.origin == "staged" and not (0 <= part.area < areas and _STAGED_NAME.fullmatch(part.name)):
            raise ValueError(f"no staged file '{part.name}' in area {part.area}")
        end = part.start + part.length
    if end != log.size or not 0 <= log.first <= log.size:
        raise ValueError("its parts do not end at its size")
    return log


def whole(size: int, first: int, area: int, name: str) -> tuple[Part, ...]:
    """The parts of a file that lies in an area as a whole, kept from byte `first` on."""
    return (Part(first, size - first, "staged", area, name, first),) if size > first else ()
