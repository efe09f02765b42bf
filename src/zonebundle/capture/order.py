"""What the agent tells a hold worker about one hold, and what it is told back (the payload of their messages)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zonebundle.model.record import Intent, Limits
from zonebundle.model.report import Gap


@dataclass(frozen=True, slots=True)
class HoldSettings:
    """The part of the configuration that a hold needs. Seconds and bytes.

    `stacks` is "user" (with a host tool, where there is one) or "kernel". `staging` maps mount points to directories.
    `index` is the file that tells what the store has; empty while there is none to be trusted.
    """

    budget: float = 2.0
    copy_limit: int = 64 << 20
    commands: tuple[tuple[str, ...], ...] = ()
    stacks: str = "user"
    staging: dict[str, str] = field(default_factory=dict)
    zone_roots: tuple[str, ...] = ()
    state_dir: str = ""
    installation: str = ""
    limits: Limits = field(default_factory=Limits)
    index: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "copy_limit": self.copy_limit,
            "commands": [list(command) for command in self.commands],
            "stacks": self.stacks,
            "staging": self.staging,
            "zone_roots": list(self.zone_roots),
            "state_dir": self.state_dir,
            "installation": self.installation,
            "limits": [self.limits.file, self.limits.bundle, self.limits.files],
            "index": self.index,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HoldSettings:
        return cls(
            budget=data["budget"],
            copy_limit=data["copy_limit"],
            commands=tuple(tuple(command) for command in data["commands"]),
            stacks=data["stacks"],
            staging=data["staging"],
            zone_roots=tuple(data["zone_roots"]),
            state_dir=data["state_dir"],
            installation=data["installation"],
            limits=Limits(*data["limits"]),
            index=data["index"],
        )


@dataclass(frozen=True, slots=True)
class HoldOrder:
    """One hold: the spool entry, the intent, when it began (CLOCK_MONOTONIC, the same in every process), the settings.

    The settings are not in its message: they name the root of every zone, and a worker is told of them once. `probe`
    is false where the zone has no processes any more, or where this worker replaces one that died.
    """

    entry: str
    intent: Intent
    began: float
    settings: HoldSettings
    probe: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "entry": self.entry,
            "intent": self.intent.to_json(),
            "began": self.began,
            "probe": self.probe,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], settings: HoldSettings) -> HoldOrder:
        return cls(
            entry=data["entry"],
            intent=Intent.from_json(data["intent"]),
            began=data["began"],
            settings=settings,
            probe=data["probe"],
        )


@dataclass(frozen=True, slots=True)
class SharedSnapshot:
    """A snapshot that this hold reads from, made by itself or by the bundle `leader`."""

    kind: str
    area: str
    leader: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "area": self.area, "leader": self.leader}


@dataclass(frozen=True, slots=True)
class FinishOrder:
    """The last part of a hold: which snapshots to record, by group; who follows; what went wrong outside.

    `graceful` is how many seconds the runtime's graceful stop took, `living` whether the zone still runs,
    `durable` whether staged bytes must be on disk before the reply, because the zone's files go afterwards.
    """

    graceful: float
    living: bool
    durable: bool
    remove: bool
    snapshots: dict[str, SharedSnapshot] = field(default_factory=dict)
    followers: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "graceful": self.graceful,
            "living": self.living,
            "durable": self.durable,
            "remove": self.remove,
            "snapshots": {group: shared.to_json() for group, shared in self.snapshots.items()},
            "followers": list(self.followers),
            "gaps": [gap.to_json() for gap in self.gaps],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FinishOrder:
        return cls(
            graceful=data["graceful"],
            living=data["living"],
            durable=data["durable"],
            remove=data["remove"],
            snapshots={group: SharedSnapshot(**shared) for group, shared in data["snapshots"].items()},
            followers=tuple(data["followers"]),
            gaps=tuple(Gap.from_json(gap) for gap in data["gaps"]),
        )
