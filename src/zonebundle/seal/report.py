"""What is told of a seal: the gaps, report.json, trace.json, and errors in one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable

from zonebundle.errors import ZoneBundleError
from zonebundle.model.record import RecordHeader
from zonebundle.model.report import Gap, Step, trace_events

# A hostile directory can have a million files that cannot be read: all are counted, the first ones are listed.
_LISTED = 10_000


class Gaps:
    """The gaps of one bundle. May be added to by several threads."""

    def __init__(self) -> None:
        self._listed: list[Gap] = []
        self._lock = threading.Lock()
        self.count = 0

    def add(self, gap: Gap) -> None:
        with self._lock:
            self.count += 1
            if len(self._listed) < _LISTED:
                self._listed.append(gap)

    def listed(self) -> list[Gap]:
        """The gaps, and a last one that tells how many there are beyond."""
        beyond = self.count - len(self._listed)
        more = [Gap("further gaps", f"{beyond} more are not listed")] if beyond else []
        return [*self._listed, *more]


def report_json(header: RecordHeader, steps: Iterable[Step], gaps: Gaps) -> bytes:
    """The entry report.json."""
    report = {
        "zone": header.metadata.zone,
        "bundle_id": header.metadata.bundle_id,
        "steps": [step.to_json() for step in steps],
        "gaps": [gap.to_json() for gap in gaps.listed()],
        "hold_seconds": round(header.hold_seconds, 6),
        "graceful_seconds": round(header.graceful_seconds, 6),
    }
    return json.dumps(report, indent=1).encode() + b"\n"


def trace_json(header: RecordHeader, steps: Iterable[Step]) -> bytes:
    """The entry trace.json."""
    return json.dumps(trace_events(header.metadata.zone, list(steps)), separators=(",", ":")).encode() + b"\n"


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, ZoneBundleError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror.lower()
    return f"{type(error).__name__}: {error}"
