"""From a record to the logs of its bundle, in the order of the archive, within the limits."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from zonebundle.errors import OutsideRootError
from zonebundle.host import syscalls
from zonebundle.host.files import Found, open_root, walk_beneath
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import decode_line
from zonebundle.model.metadata import parse_time
from zonebundle.model.paths import printable
from zonebundle.model.quantities import format_size
from zonebundle.model.record import LIVE, Limits, LogFile, Part, SnapshotTree
from zonebundle.model.report import Gap
from zonebundle.model.zone import LogTree
from zonebundle.seal.areas import SNAPSHOT, OpenAreas
from zonebundle.seal.entry import Record, SpoolEntry, whole
from zonebundle.seal.report import Gaps
from zonebundle.snapshots.links import is_suspect
from zonebundle.snapshots.wanted import Wanted

# So many found files are sorted in memory; more are sorted in runs of this size, in a file without a name.
_SORTED_AT_ONCE = 20_000
_UNSAFE = re.compile(rb"(?:^|/)\.{0,2}(?:/|$)|\0")
JOURNALS = (".journal", ".journal~")
"""How files end that are collected through journalctl only."""


@dataclass(frozen=True, slots=True)
class PlannedLog:
    """A log on its way into the bundle: its entry's path, and how many bytes are kept of it.

    The number is the same in every attempt to seal the bundle.
    """

    number: int
    path: bytes
    length: int
    log: LogFile


@dataclass(frozen=True, slots=True)
class Plan:
    """`bytes` is what the logs come to, about; they are made as they are asked for, and what is left out is a gap."""

    bytes: int
    logs: Iterator[PlannedLog]


@contextlib.contextmanager
def plan(entry: SpoolEntry, record: Record, areas: OpenAreas) -> Iterator[Plan]:
    """The logs of a bundle: those that were staged as the record has them, then each snapshot's, newest first.

    Walks the snapshots. Raises FormatError, SealError, OSError (no space to sort a million names).
    """
    with contextlib.ExitStack() as runs:
        limits = record.header.limits
        recorded = _recorded(entry, areas) if any(tree.area == LIVE for tree in record.trees) else frozenset()
        # The bundle was created when its hold began.
        created = round(parse_time(record.header.metadata.time_created) * 1e9)
        found = [
            _Walk(tree, areas, limits, _Runs(entry.path, runs), record.gaps, recorded, created) for tree in record.trees
        ]
        total = record.bytes + sum(walk.bytes for walk in found)
        yield Plan(total, _number(_all_logs(entry, areas, found), limits, record.gaps))


def _recorded(entry: SpoolEntry, areas: OpenAreas) -> frozenset[tuple[str, bytes]]:
    """Source and path of every log that the record has: a live tree is not to bring it a second time."""
    return frozenset((log.source, log.path) for log in entry.log_files(len(areas)))


def _all_logs(entry: SpoolEntry, areas: OpenAreas, found: Iterable[_Walk]) -> Iterator[LogFile]:
    yield from entry.log_files(len(areas))
    for walk in found:
        yield from walk.logs()


def _number(logs: Iterable[LogFile], limits: Limits, gaps: Gaps) -> Iterator[PlannedLog]:
    """Give the logs their paths and numbers, and leave out what is beyond the bundle's limits."""
    files = total = left_out = bytes_left_out = 0
    for number, log in enumerate(logs):
        path = _entry_path(log)
        if path is None:
            gaps.add(Gap(printable(log.path), "its path leads out of the bundle; it is left out"))
            continue
        length = log.size - log.first
        if files >= limits.files or total + length > limits.bundle:
            left_out += 1
            bytes_left_out += length
            continue
        files += 1
        total += length
        yield PlannedLog(number, path, length, log)
    if left_out:
        gaps.add(
            Gap(
                f"{left_out} logs, {format_size(bytes_left_out)}",
                f"beyond the limits of a bundle ({limits.files} files, {format_size(limits.bundle)}); "
                "the newest logs are kept",
            )
        )


def _entry_path(log: LogFile) -> bytes | None:
    path = b"logs/%s/%s" % (log.source.encode("utf-8", "surrogateescape"), log.path)
    # The names are a stranger's: nothing may be unpacked outside the directory that it is unpacked in.
    if _UNSAFE.search(path):
        return None
    return path + b".from-%d" % log.first if log.first else path


class _Runs:
    """Found files, to be given back sorted: a million of them would not fit into the sealer's memory."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._files: list[IO[bytes]] = []
        self._names: list[_Name] = []

    def add(self, name: _Name) -> None:
        self._names.append(name)
        if len(self._names) >= _SORTED_AT_ONCE:
            self._names.sort()
            # Without a name where the file system can do that: gone with the process, however that ends.
            file = self._stack.enter_context(tempfile.TemporaryFile(dir=self._directory))  # noqa: SIM115
            self._files.append(file)
            file.writelines(json.dumps(name).encode("ascii") + b"\n" for name in self._names)
            self._names.clear()

    def sorted(self) -> Iterator[_Name]:
        self._names.sort()
        return heapq.merge(self._names, *(_read_run(file) for file in self._files))


class _Walk:
    """The files of one log tree in a snapshot, newest first. `bytes` is what they come to."""

    def __init__(
        self,
        tree: SnapshotTree,
        areas: OpenAreas,
        limits: Limits,
        runs: _Runs,
        gaps: Gaps,
        recorded: frozenset[tuple[str, bytes]],
        taken_after: int,
    ) -> None:
        """`taken_after`: wall clock (ns), no later than the snapshot."""
        self._tree = tree
        self._limit = limits.file
        self._gaps = gaps
        self._runs = runs
        self._wanted = Wanted(LogTree(tree.source, tree.host_root, tree.patterns, tree.prefix))
        self._linked: set[int] = set()
        self._taken_after = taken_after
        self._device = -1
        self._recorded = recorded if tree.area == LIVE else frozenset()
        self.bytes = 0
        try:
            root = open_root(tree.host_root) if tree.area == LIVE else areas.open_tree(tree.area, tree.path)
        except (OSError, OutsideRootError) as error:
            self._gap("", f"its directory cannot be opened any more: {error}")
            return
        try:
            self._device = os.fstat(root).st_dev
            for top in self._wanted.tops:
                with contextlib.suppress(FileNotFoundError):
                    self._walk(root, top)
        finally:
            os.close(root)

    def _walk(self, root: int, top: str) -> None:
        for item in walk_beneath(root, top):
            if isinstance(item, Found):
                if self._wanted.matches(item.path) and self._is_taken(root, item):
                    self._runs.add(_name(item, *self._stamps(root, item)))
                    self.bytes += min(item.status.st_size, self._limit)
            elif item.lost:
                self._gap(item.path, item.reason)

    def _stamps(self, root: int, found: Found) -> tuple[int, int]:
        """ctime and birth of a file in a snapshot, if a change after the snapshot would show in its log."""
        status = found.status
        state = FileIdentity(0, status.st_ino, 0, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if self._tree.area == LIVE or status.st_dev != self._device or not state.is_settled(self._taken_after):
            return 0, 0
        return status.st_ctime_ns, syscalls.birth_time_ns(root, os.fsencode(found.path))

    def _gap(self, path: str, reason: str) -> None:
        what = "/".join(part for part in ("logs", self._tree.source, self._tree.prefix, path) if part)
        self._gaps.add(Gap(printable(what), reason))

    def _is_taken(self, root: int, found: Found) -> bool:
        if found.path.endswith(JOURNALS):
            return False
        if self._recorded and (self._tree.source, os.fsencode(self._prefixed(found.path))) in self._recorded:
            return False
        status = found.status
        if status.st_nlink == 1:
            return True
        if status.st_ino in self._linked:
            return False
        self._linked.add(status.st_ino)
        # As in staging: who may write in a directory could have linked a file there that is not theirs to read.
        if is_suspect(status, os.stat(os.path.dirname(found.path) or ".", dir_fd=root, follow_symlinks=False).st_uid):
            self._gap(found.path, "has several links and another owner than its directory; it may be another's file")
            return False
        return True

    def _prefixed(self, path: str) -> str:
        return f"{self._tree.prefix}/{path}" if self._tree.prefix else path

    def logs(self) -> Iterator[LogFile]:
        """The log files, once."""
        return map(self._log, self._runs.sorted())

    def _log(self, name: _Name) -> LogFile:
        newness, path, size, mode, inode, ctime_ns, born_ns = name
        first = max(0, size - self._limit)
        if self._tree.area == LIVE:
            parts: tuple[Part, ...] = (Part(first, size - first, "live"),) if size > first else ()
        else:
            in_area = "/".join(part for part in (SNAPSHOT, self._tree.path, path) if part)
            parts = whole(size, first, self._tree.area, in_area)
        return LogFile(
            source=self._tree.source,
            path=os.fsencode(self._prefixed(path)),
            host_root=self._tree.host_root,
            host_path=os.fsencode(path),
            size=size,
            mode=mode,
            mtime_ns=-newness,
            inode=inode,
            parts=parts,
            identity=FileIdentity(self._tree.filesystem, inode, born_ns, size, -newness, ctime_ns)
            if ctime_ns and not first
            else None,
        )


# -mtime (ns), so that the newest comes first; path; size; mode; inode; ctime and birth (ns; ctime 0: not certain).
_Name = tuple[int, str, int, int, int, int, int]


def _name(found: Found, ctime_ns: int, born_ns: int) -> _Name:
    status = found.status
    mode = status.st_mode & 0o7777
    return (-status.st_mtime_ns, found.path, status.st_size, mode, status.st_ino, ctime_ns, born_ns)


def _read_run(file: IO[bytes]) -> Iterator[_Name]:
    file.seek(0)
    for line in file:
        newness, path, size, mode, inode, ctime_ns, born_ns = decode_line(line)
        yield newness, path, size, mode, inode, ctime_ns, born_ns
