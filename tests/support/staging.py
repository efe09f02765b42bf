"""Staging as a test wants it: a tree, an area, and the bytes that the record promises."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zonebundle.model.ids import new_bundle_id, new_installation_id, snapshot_name
from zonebundle.model.manifest import decode_line, encode_line
from zonebundle.model.record import Area, KnownLog, Limits, LogFile
from zonebundle.model.report import Gap, Step
from zonebundle.model.zone import LogTree
from zonebundle.snapshots.areas import destroy_area, prepare_area
from zonebundle.snapshots.base import Choice, Kind, KnownFiles, OpenTree
from zonebundle.snapshots.outcome import Told
from zonebundle.snapshots.placing import Near
from zonebundle.snapshots.staged import stage

INSTALLATION = new_installation_id()
MUCH = 64 << 20


@dataclass
class Kept:
    """What a staging yielded, and where."""

    area: Area
    logs: list[LogFile] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add(self, item: Told) -> None:
        if isinstance(item, LogFile):
            self.logs.append(item)
        elif isinstance(item, KnownLog):
            self.logs.append(LogFile.from_json(decode_line(encode_line(item.to_json()))))
        elif isinstance(item, Gap):
            self.gaps.append(item)
        else:
            self.steps.append(item)

    @property
    def paths(self) -> list[str]:
        return [os.fsdecode(log.path) for log in self.logs]

    def log(self, path: str | bytes) -> LogFile:
        (found,) = [log for log in self.logs if log.path == os.fsencode(path)]
        return found

    def origins(self, path: str) -> list[str]:
        return [part.origin for part in self.log(path).parts]

    def content(self, log: LogFile) -> bytes:
        """The bytes that are kept of a log, live ones from the file at its place."""
        pieces = []
        at = log.first
        for part in log.parts:
            assert part.start == at, "parts are adjacent"
            assert part.length > 0
            at += part.length
            if part.origin == "staged":
                path, offset = Path(self.area.path, part.name), part.offset
            else:
                path, offset = Path(log.host_root, os.fsdecode(log.host_path)), part.start
            with path.open("rb") as file:
                file.seek(offset)
                pieces.append(file.read(part.length))
            assert len(pieces[-1]) == part.length
        assert at == log.size, "parts end at the size"
        return b"".join(pieces)

    @property
    def contents(self) -> dict[str, bytes]:
        return {os.fsdecode(log.path): self.content(log) for log in self.logs}

    def destroy(self) -> None:
        destroy_area(self.area, INSTALLATION)


@contextmanager
def opened(path: Path, **fields: Any) -> Iterator[OpenTree]:
    """A log tree with its directory open."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield OpenTree(LogTree("zone", str(path), **fields), descriptor)
    finally:
        os.close(descriptor)


def new_area(staging: Path, kind: str = "staged") -> Area:
    """A prepared area."""
    staging.mkdir(mode=0o700, exist_ok=True)
    bundle = new_bundle_id()
    path = staging / snapshot_name(INSTALLATION, bundle)
    prepare_area(path, INSTALLATION)
    return Area("btrfs" if kind == "btrfs" else "staged", str(path), bundle)


def keep(
    path: Path,
    staging: Path,
    kind: Kind,
    *,
    seconds: float = 30.0,
    copy_limit: int = MUCH,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    living: bool = True,
    durable: bool = False,
    known: KnownFiles | None = None,
    prepare: Callable[[], None] | None = None,
    near: Near | None = None,
    area: Area | None = None,
    **fields: Any,
) -> Kept:
    """Stage the logs below `path` into an area in `staging`, a fresh one if none is given."""
    kept = Kept(area or new_area(staging))
    with opened(path, **fields) as tree:
        items = stage(
            [(tree, Choice(kind, str(staging)))],
            Path(kept.area.path),
            0,
            deadline=time.monotonic() + seconds,
            copy_limit=copy_limit,
            limits=limits,
            living=living,
            durable=durable,
            known=known,
            prepare=prepare,
            near=near,
        )
        for item in items:
            kept.add(item)
    return kept
