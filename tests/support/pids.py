"""PIDs on demand: recycled ones are what a careless collector takes for the process that had them before."""

import os
import signal
from pathlib import Path

import pytest

_LAST = Path("/proc/sys/kernel/ns_last_pid")


def fork_with_pid(wanted: int) -> int:
    """A child of this process with the PID `wanted`, which waits to be killed. Skips the test if it cannot be had."""
    if not os.access(_LAST, os.W_OK):
        pytest.skip("choosing a PID needs root")
    for _ in range(50):
        _LAST.write_text(str(wanted - 1))
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        if pid == wanted:
            return pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    pytest.skip(f"PID {wanted} was taken by somebody else each time")
