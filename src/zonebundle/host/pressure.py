"""How much the host's work waits for something: the kernel's pressure stall information (accounting/psi.rst)."""

from __future__ import annotations

from pathlib import Path

_DIRECTORY = Path("/proc/pressure")


def read_pressure(resource: str, directory: Path = _DIRECTORY) -> float:
    """For how many percent of the last ten seconds something on the host waited for `resource`: "cpu", "io", "memory".

    0 where the kernel does not tell.
    """
    try:
        text = (directory / resource).read_text("ascii")
    except OSError:
        return 0.0
    # some avg10=1.53 avg60=0.87 avg300=0.35 total=1157622
    for line in text.splitlines():
        kind, *fields = line.split()
        for field in fields:
            if kind == "some" and field.startswith("avg10="):
                return float(field.removeprefix("avg10="))
    return 0.0
