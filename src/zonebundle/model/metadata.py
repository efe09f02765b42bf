"""What Omicron tells of a bundle: its identity, age and cause (the shapes of its API and of `metadata.toml`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

METADATA_VERSION = 0


class Cause(StrEnum):
    """Why a bundle was made; `priority` orders them for the clean-up, low first."""

    OTHER = "other"
    UNEXPECTED_ZONE = "unexpected_zone"
    TERMINATED_INSTANCE = "terminated_instance"
    EXPLICIT_REQUEST = "explicit_request"

    @property
    def priority(self) -> int:
        return list(Cause).index(self)


@dataclass(frozen=True, slots=True)
class Metadata:
    """The identity of a bundle. `time_created` is RFC 3339 in UTC."""

    zone: str
    bundle_id: str
    time_created: str
    cause: Cause
    version: int = METADATA_VERSION

    def to_json(self) -> dict[str, Any]:
        return {
            "id": {"zone_name": self.zone, "bundle_id": self.bundle_id},
            "time_created": self.time_created,
            "version": self.version,
            "cause": str(self.cause),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Metadata:
        identity = data["id"]
        return cls(
            zone=identity["zone_name"],
            bundle_id=identity["bundle_id"],
            time_created=data["time_created"],
            cause=Cause(data["cause"]),
            version=data["version"],
        )

    def to_toml(self) -> bytes:
        """The first entry of a bundle, with Omicron's keys."""
        # A JSON string of these restricted names is also a TOML basic string.
        return (
            f"time_created = {json.dumps(self.time_created)}\n"
            f"version = {self.version}\n"
            f"cause = {json.dumps(str(self.cause))}\n"
            "\n[id]\n"
            f"zone_name = {json.dumps(self.zone)}\n"
            f"bundle_id = {json.dumps(self.bundle_id)}\n"
        ).encode()


def format_time(seconds: float) -> str:
    """RFC 3339 in UTC, microseconds: `2026-01-02T03:04:05.000006Z`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> float:
    """Seconds since the epoch of an RFC 3339 time. Raises ValueError, also where the offset from UTC is missing."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"'{text}' has no offset from UTC: write it like 2026-01-02T03:04:05Z")
    return time.timestamp()
