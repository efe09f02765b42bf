"""Spool entries as captures leave them: a record, outputs, and logs staged in real files."""

import io
import itertools
import json
import os
import tarfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.stored import check_clean, check_whole
from zonebundle.capture.record_writer import RecordWriter
from zonebundle.model.ids import snapshot_name
from zonebundle.model.metadata import Cause, Metadata, format_time
from zonebundle.model.record import Area, Limits, LogFile, Output, Part, RecordHeader, SnapshotTree
from zonebundle.model.report import Gap, Outcome, Step
from zonebundle.snapshots.areas import prepare_area
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader
from zonebundle.store.splice import splice
from zonebundle.store.store import prepare

INSTALLATION = "0123456789ab"
CREATED = 1_767_225_600.25
MTIME_NS = 1_767_000_000_123_456_789

_inodes = itertools.count(1 << 40)


@dataclass(frozen=True)
class SpoolDir:
    """A state directory, an empty store and a staging directory below `base`."""

    base: Path

    @property
    def state(self) -> Path:
        return self.base / "state"

    @property
    def spool(self) -> Path:
        return self.state / "spool"

    @property
    def store(self) -> Path:
        return self.base / "store"

    @property
    def staging(self) -> Path:
        return self.base / "staging"

    @property
    def zone_root(self) -> Path:
        return self.base / "root"

    def make(self) -> "SpoolDir":
        for directory in (self.spool, self.staging, self.zone_root):
            directory.mkdir(parents=True, mode=0o700)
        prepare(self.store)
        return self

    def left(self) -> list[str]:
        """What is in the spool and in the staging directory: nothing, when everything is sealed."""
        return sorted(str(path.relative_to(self.base)) for top in (self.spool, self.staging) for path in top.iterdir())

    def entries(self, draft: "Draft") -> dict[bytes, tuple[tarfile.TarInfo, bytes]]:
        """The entries of a sealed bundle, read with Python's tarfile from the spliced tar.gz."""
        bundle = StoreReader.open(self.store).find(draft.zone, draft.bundle_id)
        data = io.BytesIO(b"".join(splice(bundle)))
        found: dict[bytes, tuple[tarfile.TarInfo, bytes]] = {}
        with tarfile.open(fileobj=data, mode="r:gz", encoding="utf-8", errors="surrogateescape") as archive:
            for info in archive:
                content = archive.extractfile(info)
                assert content is not None
                name = os.fsencode(info.name)
                assert name not in found
                found[name] = (info, content.read())
        return found

    def logs(self, draft: "Draft") -> dict[bytes, bytes]:
        """The logs of a sealed bundle by their path below logs/."""
        prefix = b"logs/"
        return {
            name.removeprefix(prefix): data
            for name, (_, data) in self.entries(draft).items()
            if name.startswith(prefix)
        }

    def report(self, draft: "Draft") -> dict[str, Any]:
        """The report of a sealed bundle."""
        told: dict[str, Any] = json.loads(self.entries(draft)[b"report.json"][1])
        return told

    def gaps(self, draft: "Draft") -> dict[str, str]:
        """Reasons by what is missing, but for the gap that every draft has."""
        gaps = {gap["what"]: gap["reason"] for gap in self.report(draft)["gaps"]}
        assert gaps.pop("pstack.7") == "the process was gone"
        return gaps


@dataclass
class Draft:
    """A capture on its way into the spool. `write` makes it one that can be sealed."""

    at: SpoolDir
    zone: str = "web"
    bundle_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    limits: Limits = field(default_factory=Limits)
    followers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.entry = self.at.spool / self.bundle_id
        self.entry.mkdir(mode=0o700)
        (self.entry / "intent.json").write_text("{}")
        self.writer = RecordWriter(self.entry)
        self.areas = 0
        self.staged = 0
        self.own_area: Path | None = None
        self.expected: dict[bytes, bytes] = {}

    def add_area(self, area: Area) -> int:
        self.writer.add("area", area.to_json())
        self.areas += 1
        return self.areas - 1

    def area(self) -> Path:
        """The bundle's own staging area, made when it is first needed; it is area number 0."""
        if self.own_area is None:
            assert self.areas == 0
            self.own_area = self.at.staging / snapshot_name(INSTALLATION, self.bundle_id)
            prepare_area(self.own_area, INSTALLATION)
            (self.own_area / "files").mkdir(exist_ok=True)
            self.add_area(Area("staged", str(self.own_area), self.bundle_id))
        return self.own_area

    def stage_bytes(self, data: bytes) -> str:
        """Put a file into the area; returns its name there."""
        name = f"files/{self.staged}"
        self.staged += 1
        (self.area() / name).write_bytes(data)
        return name

    def add_log(self, path: bytes, data: bytes, *, mode: int = 0o644, mtime_ns: int = MTIME_NS) -> LogFile:
        """A log that was staged as a whole."""
        name = self.stage_bytes(data)
        parts = (Part(0, len(data), "staged", 0, name, 0),) if data else ()
        self.expected[b"zone/" + path] = data
        return self.add_file(path, len(data), parts, mode=mode, mtime_ns=mtime_ns)

    def add_file(
        self,
        path: bytes,
        size: int,
        parts: tuple[Part, ...],
        *,
        mode: int = 0o644,
        mtime_ns: int = MTIME_NS,
        inode: int | None = None,
        host_path: bytes | None = None,
    ) -> LogFile:
        log = LogFile(
            source="zone",
            path=path,
            host_root=str(self.at.zone_root),
            host_path=path if host_path is None else host_path,
            size=size,
            mode=mode,
            mtime_ns=mtime_ns,
            inode=next(_inodes) if inode is None else inode,
            parts=parts,
        )
        self.writer.add("file", log.to_json())
        return log

    def add_tree(self, tree: SnapshotTree) -> None:
        self.writer.add("tree", tree.to_json())

    def add_output(self, name: str, data: bytes) -> None:
        offset, length = self.writer.add_output(data)
        self.writer.add("output", Output(name, offset, length).to_json())

    def write(self) -> str:
        """Commit the record; returns the bundle's ID."""
        self.writer.add("step", Step("ptree", Outcome.SUCCESS, 0.001, 0.002, entry="ptree").to_json())
        self.writer.add("gap", Gap("pstack.7", "the process was gone").to_json())
        if self.followers:
            self.writer.add("followers", list(self.followers))
        self.writer.commit(
            RecordHeader(
                metadata=Metadata(self.zone, self.bundle_id, format_time(CREATED), Cause.TERMINATED_INSTANCE),
                operation="stop",
                hold_seconds=0.004,
                graceful_seconds=0.5,
                outputs=self.writer.output_bytes,
                limits=self.limits,
            )
        )
        return self.bundle_id


_LINES = b"".join(
    b'{"at":"2026-01-01T%02d:%02d","n":%d,"message":"request %x served"}\n'
    % (number // 60 % 24, number % 60, number, number * 2654435761 % (1 << 32))
    for number in range(40)
)


def log_lines(size: int, seed: int = 0) -> bytes:
    """`size` bytes that look like a log and compress like one; no two seeds have a chunk in common."""
    count = size // len(_LINES) + 1
    return b"".join(b'{"seed":%d,"block":%d}\n%s' % (seed, number, _LINES) for number in range(count))[:size]


def full_draft(at: SpoolDir) -> Draft:
    """A draft with everything that a record may have."""
    draft = Draft(at)
    snapshot = at.staging / snapshot_name(INSTALLATION, draft.bundle_id)
    draft.add_output("ptree", b"1 init\n")
    draft.area()
    (snapshot / "snapshot/logs").mkdir(parents=True)
    for number in range(5):
        data = log_lines(number * 30_000, 100 + number)
        (snapshot / f"snapshot/logs/{number}.snap").write_bytes(data)
        draft.expected[b"zone/logs/%d.snap" % number] = data
    draft.add_tree(SnapshotTree(0, "logs", "zone", "logs", ("logs/**",), str(at.zone_root)))
    draft.add_log(b"big.log", log_lines(6 * CHUNK + 123))
    for number in range(50):
        draft.add_log(b"small/%d.log" % number, log_lines(number * 100, number))
    live = at.zone_root / "live.log"
    data = log_lines(CHUNK + 7, 77)
    live.write_bytes(data)
    status = live.stat()
    name = draft.stage_bytes(data[-100:])
    cut = len(data) - 100
    draft.add_file(
        b"live.log",
        len(data),
        (Part(0, cut, "live"), Part(cut, 100, "staged", 0, name, 0)),
        inode=status.st_ino,
        mtime_ns=status.st_mtime_ns,
    )
    draft.expected[b"zone/live.log"] = data
    return draft


def check_sealed(at: SpoolDir, draft: Draft, gaps: int = 1) -> None:
    """The bundle has every byte, and nothing is left of its making."""
    assert at.logs(draft) == draft.expected
    bundle = StoreReader.open(at.store).find(draft.zone, draft.bundle_id)
    assert bundle.header.gaps == gaps
    check_whole(bundle)
    check_clean(at.store)
    assert at.left() == []
