"""Time as a dependency: tests hand in their own clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds: `now` since the epoch, `monotonic` since some fixed point."""

    def now(self) -> float: ...

    def monotonic(self) -> float: ...


class SystemClock:
    """The host's clocks."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
