"""Background work steps back: low CPU and I/O priority for the sealer."""

from __future__ import annotations

import contextlib
import os

from zonebundle.host.syscalls import set_idle_io_priority

_LOWEST_NICE = 19


def lower_priority() -> None:
    """Run this process as batch work, at the lowest nice value and idle I/O priority. What is refused is left out.

    SCHED_IDLE is not used: on a host that is busy for hours it would never seal.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_NICE)
    set_idle_io_priority()
