"""Named trace points, at which the crash tests kill the agent.

`point(name)` does nothing unless the environment names that point in ZONE_BUNDLE_CRASH_AT. Then the process whose PID
is in ZONE_BUNDLE_CRASH_PID (the agent tells its children its own) is killed with SIGKILL, and so is the caller: as if
the machine's memory had vanished at that line. `name:n` kills at the n-th passage.
"""

from __future__ import annotations

import os
import signal
from typing import Final

CRASH_AT: Final = "ZONE_BUNDLE_CRASH_AT"
CRASH_PID: Final = "ZONE_BUNDLE_CRASH_PID"

POINTS: Final = (
    "stop.accepted",
    "stop.intent-durable",
    "stop.probed",
    "stop.terminated",
    "capture.snapshot-taken",
    "capture.staged-half",
    "capture.staged",
    "capture.record-written",
    "capture.record-durable",
    "stop.removed",
    "stop.released",
    "seal.started",
    "seal.planned",
    "seal.reading",
    "seal.segment-written",
    "seal.segments-durable",
    "seal.frame-written",
    "seal.manifest-written",
    "seal.committed",
    "seal.areas-destroyed",
    "seal.spool-removed",
    "delete.uncommitted",
    "delete.frame-removed",
    "delete.segments-removed",
    "prune.forgotten",
    "prune.moved",
    "prune.removed",
    "replicate.segments-durable",
    "replicate.frame-written",
    "replicate.committed",
    "repair.segment-replaced",
    "repair.bundle-copied",
    "ahead.read",
    "ahead.added",
)

_name, _, _count = os.environ.get(CRASH_AT, "").partition(":")
_left = int(_count or 1)


def point(name: str) -> None:
    """Mark a place between two steps of the crash protocol; `name` is one of POINTS."""
    global _left
    if name != _name:
        return
    _left -= 1
    if _left > 0:
        return
    agent = int(os.environ.get(CRASH_PID, "0"))
    if agent > 1 and agent != os.getpid():
        os.kill(agent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
