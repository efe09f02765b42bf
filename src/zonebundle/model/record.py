"""What the spool says of a bundle on its way: the intent, and the capture record.

intent.json is written before the zone is touched. capture.jsonl is the record, JSON Lines, durable before the zone is
released; its first line is the header, then one object a line, told apart by its only key:

    {"record": 1, …}        the header, and in it the digest of record and outputs (see record_digest)
    {"step": {…}}           see model.report
    {"gap": {…}}
    {"output": {…}}         a byte range of the spool's outputs file that becomes an entry
    {"followers": […]}      the bundles that share the snapshot which this one leads
    {"area": {…}}           a snapshot or staging area that this record reads from, in the order of their numbers
    {"tree": {…}}           a log tree to be walked behind, in a snapshot or at its place
    {"file": {…}}           a log file whose size and parts are fixed
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson
from blake3 import blake3

from zonebundle.errors import FormatError
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece, encode_line
from zonebundle.model.metadata import Cause, Metadata
from zonebundle.model.paths import path_from_json, path_to_json
from zonebundle.model.zone import Zone

INTENT_FORMAT = 1
RECORD_FORMAT = 1

# The names in a spool entry, `<state-dir>/spool/<bundle-id>/`.
INTENT_FILE = "intent.json"
RECORD_FILE = "capture.jsonl"
OUTPUTS_FILE = "outputs"
COMMANDS_FILE = "commands.jsonl"

Operation = Literal["stop", "create"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one bundle: bytes of a file, bytes of all, number of files. Past them the newest is kept."""

    file: int = 32 << 30
    bundle: int = 64 << 30
    files: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Intent:
    """What is about to be done to which incarnation of a zone. `grace` is seconds."""

    metadata: Metadata
    operation: Operation
    zone: Zone
    snapshot: str
    grace: float = 10.0
    remove: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "intent": INTENT_FORMAT,
            "metadata": self.metadata.to_json(),
            "operation": self.operation,
            "zone": self.zone.to_json(),
            "snapshot": self.snapshot,
            "grace": self.grace,
            "remove": self.remove,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Intent:
        if data.get("intent") != INTENT_FORMAT:
            raise FormatError(f"intent format {data.get('intent')!r} is not {INTENT_FORMAT}: use a newer zonebundle")
        return cls(
            metadata=Metadata.from_json(data["metadata"]),
            operation=data["operation"],
            zone=Zone.from_json(data["zone"]),
            snapshot=data["snapshot"],
            grace=data["grace"],
            remove=data["remove"],
        )


@dataclass(frozen=True, slots=True)
class Area:
    """A snapshot or a staging area that holds log bytes until the seal.

    `path` is its directory `…/zb-<installation>-<leader>`; `kind` says how it is destroyed; `leader` is the bundle
    that made it: a follower shares the leader's snapshot, and it is destroyed when none uses it any more. "entry" is
    the spool entry itself, with copies of a few small logs; it has no mark, and goes with all that it holds.
    """

    kind: Literal["btrfs", "staged", "entry"]
    path: str
    leader: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": self.path, "leader": self.leader}


class Part(NamedTuple):
    """Where a byte range of a log is read from.

    `start` and `length` are the range in the log file. `origin` "staged": the file `name` in area number `area`,
    at `offset`. "live": the log itself at its place on the host, found again by its inode, for what was not staged.
    A tuple, because a hold makes one for each log: a frozen dataclass takes four times as long.
    """

    start: int
    length: int
    origin: Literal["staged", "live"]
    area: int = 0
    name: str = ""
    offset: int = 0

    def to_json(self) -> list[Any]:
        return list(self)


class LogFile(NamedTuple):
    """A log file with its size and parts fixed. `path` is relative to its source; `host_path` is where it was.

    `size` is of the whole file; the bytes kept are those of `parts`, which are adjacent and end at `size`. `identity`
    is that of the state which the parts hold, before our own link changed it; None where it is not certain. `pieces`
    are those that hold the whole log already, of one that was known; its part is where it is read if they are gone.
    A tuple, as Part is.
    """

    source: str
    path: bytes
    host_root: str
    host_path: bytes
    size: int
    mode: int
    mtime_ns: int
    inode: int
    parts: tuple[Part, ...]
    identity: FileIdentity | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def first(self) -> int:
        """The offset of the first byte that is kept."""
        return self.parts[0].start if self.parts else self.size

    def to_json(self) -> dict[str, Any]:
        paths = path_to_json(self.path) | path_to_json(self.host_path, "host_path")
        data = _log_to_json(self, paths, [part.to_json() for part in self.parts])
        if self.pieces:
            data["pieces"] = [piece.to_json() for piece in self.pieces]
        if (known := self.identity) is not None:
            data["id"] = [known.filesystem, known.born_ns, known.ctime_ns]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LogFile:
        return cls(
            source=data["source"],
            path=path_from_json(data),
            host_root=data["host_root"],
            host_path=path_from_json(data, "host_path"),
            size=data["size"],
            mode=data["mode"],
            mtime_ns=data["mtime"],
            inode=data["ino"],
            parts=tuple(Part(*fields) for fields in data["parts"]),
            identity=_identity(data),
            pieces=tuple(Piece(*fields) for fields in data.get("pieces", ())),
        )


def _identity(data: dict[str, Any]) -> FileIdentity | None:
    if "id" not in data:
        return None
    filesystem, born, ctime = data["id"]
    return FileIdentity(filesystem, data["ino"], born, data["size"], data["mtime"], ctime)


@dataclass(slots=True)
class KnownLog:
    """A LogFile of which the store has all pieces, as a hold writes it: paths as the system tells them, pieces in JSON.

    A hold writes hundreds of these: from what the index has to the record's line, nothing is taken apart. Its only part
    is the log at its place.
    """

    source: str
    path: str
    host_root: str
    host_path: str
    size: int
    mode: int
    mtime_ns: int
    inode: int
    pieces: str

    def to_json(self) -> dict[str, Any]:
        if f"{self.source}{self.host_root}{self.path}{self.host_path}".isascii():
            paths: dict[str, Any] = {"path": self.path, "host_path": self.host_path}
            pieces: Any = orjson.Fragment(self.pieces)
        else:
            # Not every such text is one to orjson; another encoder knows no fragments.
            paths = path_to_json(os.fsencode(self.path)) | path_to_json(os.fsencode(self.host_path), "host_path")
            pieces = orjson.loads(self.pieces)
        data = _log_to_json(self, paths, [[0, self.size, "live", 0, "", 0]])
        data["pieces"] = pieces
        return data


def _log_to_json(log: LogFile | KnownLog, paths: dict[str, Any], parts: list[Any]) -> dict[str, Any]:
    return {
        "source": log.source,
        "host_root": log.host_root,
        **paths,
        "size": log.size,
        "mode": log.mode,
        "mtime": log.mtime_ns,
        "ino": log.inode,
        "parts": parts,
    }


LIVE = -1


@dataclass(frozen=True, slots=True)
class SnapshotTree:
    """A log tree to be walked behind the release: inside a snapshot, or, with the area LIVE, at its place on the host.

    `path` is the tree's directory relative to the area's snapshot; `source`, `prefix` and `patterns` are as in LogTree.
    `host_root` is where the directory is on the host, `filesystem` what identities of its files name. A live tree is
    for what the budget did not let be staged: files that the record has already are passed over.
    """

    area: int
    path: str
    source: str
    prefix: str
    patterns: tuple[str, ...]
    host_root: str
    filesystem: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "area": self.area,
            "path": self.path,
            "source": self.source,
            "prefix": self.prefix,
            "patterns": list(self.patterns),
            "host_root": self.host_root,
            "filesystem": self.filesystem,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SnapshotTree:
        return cls(**{**data, "patterns": tuple(data["patterns"])})


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """The first line of capture.jsonl. Times are seconds; `outputs` is the length of the spool's outputs file."""

    metadata: Metadata
    operation: Operation
    hold_seconds: float
    graceful_seconds: float
    outputs: int
    limits: Limits
    remove: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "record": RECORD_FORMAT,
            "metadata": self.metadata.to_json(),
            "operation": self.operation,
            "hold_seconds": round(self.hold_seconds, 6),
            "graceful_seconds": round(self.graceful_seconds, 6),
            "outputs": self.outputs,
            "limits": [self.limits.file, self.limits.bundle, self.limits.files],
            "remove": self.remove,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RecordHeader:
        if data.get("record") != RECORD_FORMAT:
            raise FormatError(f"record format {data.get('record')!r} is not {RECORD_FORMAT}: use a newer zonebundle")
        return cls(
            metadata=Metadata.from_json(data["metadata"]),
            operation=data["operation"],
            hold_seconds=data["hold_seconds"],
            graceful_seconds=data["graceful_seconds"],
            outputs=data["outputs"],
            limits=Limits(*data["limits"]),
            remove=data["remove"],
        )


def record_digest(header: RecordHeader, lines: bytes, outputs: bytes) -> str:
    """What the header's line has as `digest`: it tells whether anything of an entry has changed on the disk since.

    `lines` and `outputs` are the BLAKE3 digests of the record's further lines and of the outputs file.
    """
    return blake3(lines + outputs + encode_line(header.to_json())).hexdigest()


@dataclass(frozen=True, slots=True)
class Output:
    """What a probe or a command printed: a byte range of the spool's outputs file, to become the entry `name`."""

    name: str
    offset: int
    length: int

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "offset": self.offset, "length": self.length}


def metadata_for(zone: str, bundle_id: str, created: str, operation: Operation) -> Metadata:
    """The metadata of a new bundle: a stop makes `terminated_instance`, a create `explicit_request`."""
    cause = Cause.TERMINATED_INSTANCE if operation == "stop" else Cause.EXPLICIT_REQUEST
    return Metadata(zone, bundle_id, created, cause)
