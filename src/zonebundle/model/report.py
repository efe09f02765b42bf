"""What happened while a bundle was made: steps with outcomes, and gaps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How a step ended. A `skip` is what the host lacks or does not apply; it is no gap."""

    SUCCESS = "success"
    FAIL = "fail"
    UNKNOWN = "unknown"
    SKIP = "skip"
    TIMEOUT = "timeout"
    CANCELED = "canceled"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was done. `start` and `seconds` are seconds, `start` since the hold began.

    `entry` is the bundle's entry with its output, if it has one; `lane` groups steps in the timeline.
    """

    name: str
    outcome: Outcome
    start: float = 0.0
    seconds: float = 0.0
    detail: str = ""
    entry: str = ""
    lane: str = "hold"

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": self.name,
            "outcome": str(self.outcome),
            "start": round(self.start, 6),
            "seconds": round(self.seconds, 6),
        }
        if self.detail:
            data["detail"] = self.detail
        if self.entry:
            data["entry"] = self.entry
        if self.lane != "hold":
            data["lane"] = self.lane
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Step:
        return cls(
            name=data["name"],
            outcome=Outcome(data["outcome"]),
            start=data.get("start", 0.0),
            seconds=data.get("seconds", 0.0),
            detail=data.get("detail", ""),
            entry=data.get("entry", ""),
            lane=data.get("lane", "hold"),
        )


@dataclass(frozen=True, slots=True)
class Gap:
    """Evidence that exists, was wanted, and is not in the bundle: what, and why."""

    what: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "reason": self.reason}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Gap:
        return cls(data["what"], data["reason"])


def trace_events(zone: str, steps: list[Step]) -> dict[str, Any]:
    """The collection as a Chrome trace (also read by Perfetto): one complete event a step, times in microseconds.

    Format: "Trace Event Format" of the Chromium project, JSON object form.
    """
    lanes = {lane: number for number, lane in enumerate(dict.fromkeys(step.lane for step in steps), start=1)}
    names: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": lane}}
        for lane, number in lanes.items()
    ]
    events: list[dict[str, Any]] = [
        {
            "name": step.name,
            "ph": "X",
            "pid": 1,
            "tid": lanes[step.lane],
            "ts": round(step.start * 1e6),
            "dur": round(step.seconds * 1e6),
            "args": {"outcome": str(step.outcome), "detail": step.detail},
        }
        for step in steps
    ]
    process = {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": f"zone {zone}"}}
    return {"traceEvents": [process, *names, *events], "displayTimeUnit": "ms"}
