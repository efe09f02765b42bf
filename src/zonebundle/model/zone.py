"""What a zone is, as the agent, the hold workers and the recovery see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ZoneState = Literal["running", "stopped"]


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process by PID and start time (clock ticks after boot): never by a bare PID, which is recycled."""

    pid: int
    start_time: int

    def to_json(self) -> dict[str, int]:
        return {"pid": self.pid, "start_time": self.start_time}


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One life of a zone. Recovery finishes a stop only for the incarnation that the intent names.

    `instance` is the runtime's own name of that life (a container ID), empty where it has none.
    """

    boot_id: str
    init: ProcessRef | None = None
    instance: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"boot_id": self.boot_id, "init": self.init and self.init.to_json(), "instance": self.instance}


@dataclass(frozen=True, slots=True)
class Membership:
    """How to find the zone's processes: the descendants of `roots`, the session, the cgroup (a directory)."""

    roots: tuple[ProcessRef, ...] = ()
    session: int | None = None
    cgroup: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"roots": [root.to_json() for root in self.roots], "session": self.session, "cgroup": self.cgroup}


# In the environment of commands that a runtime runs inside a zone: by it, what they leave is told from the zone's own.
COMMAND_MARK = "ZONE_BUNDLE_COMMAND=1"


@dataclass(frozen=True, slots=True)
class LogTree:
    """A directory in which logs are looked for.

    `source` names it in the bundle (`logs/<source>/…`), `path` is where it is on the host. With `via`, the directory
    is opened inside that process's mount namespace instead, where `path` is relative to the process's root. `prefix` is
    put before the paths found, for a mount that is entered explicitly; `patterns` are globs for the paths with it.
    """

    source: str
    path: str
    patterns: tuple[str, ...] = ("**",)
    prefix: str = ""
    via: ProcessRef | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "path": self.path,
            "patterns": list(self.patterns),
            "prefix": self.prefix,
            "via": self.via and self.via.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LogTree:
        return cls(
            source=data["source"],
            path=data["path"],
            patterns=tuple(data["patterns"]),
            prefix=data["prefix"],
            via=_process_ref(data["via"]),
        )


@dataclass(frozen=True, slots=True)
class Zone:
    """A zone as its runtime describes it at one moment.

    `command_prefix` is put before a command's arguments to run it inside the zone; `directory` is where it then runs.
    """

    name: str
    runtime: str
    state: ZoneState
    incarnation: Incarnation | None = None
    membership: Membership = field(default_factory=Membership)
    logs: tuple[LogTree, ...] = ()
    command_prefix: tuple[str, ...] = ()
    directory: str = "/"

    def to_json(self) -> dict[str, Any]:
        # By hand: dataclasses.asdict copies everything deeply, for a millisecond of each hold.
        return {
            "name": self.name,
            "runtime": self.runtime,
            "state": self.state,
            "incarnation": self.incarnation and self.incarnation.to_json(),
            "membership": self.membership.to_json(),
            "logs": [tree.to_json() for tree in self.logs],
            "command_prefix": list(self.command_prefix),
            "directory": self.directory,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Zone:
        return cls(
            name=data["name"],
            runtime=data["runtime"],
            state=data["state"],
            incarnation=incarnation_from_json(data["incarnation"]),
            membership=Membership(
                roots=tuple(ProcessRef(**ref) for ref in data["membership"]["roots"]),
                session=data["membership"]["session"],
                cgroup=data["membership"]["cgroup"],
            ),
            logs=tuple(map(LogTree.from_json, data["logs"])),
            command_prefix=tuple(data["command_prefix"]),
            directory=data["directory"],
        )


def _process_ref(data: dict[str, Any] | None) -> ProcessRef | None:
    return None if data is None else ProcessRef(data["pid"], data["start_time"])


def incarnation_from_json(data: dict[str, Any] | None) -> Incarnation | None:
    """The incarnation that `Incarnation.to_json` wrote."""
    if data is None:
        return None
    return Incarnation(data["boot_id"], _process_ref(data["init"]), data["instance"])
