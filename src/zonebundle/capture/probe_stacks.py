"""User stacks: a host tool that ptraces the process, run as a bounded child by whoever conducts the hold.

elfutils' eu-stack only: gdb takes hundreds of milliseconds and runs scripts that lie beside the binary. Even eu-stack
takes 10 ms, half of it CPU, for the libraries that it loads, and stops the process meanwhile.
"""

from __future__ import annotations

import shutil
import signal
from functools import cache

from zonebundle.host import proc
from zonebundle.model.paths import printable
from zonebundle.model.zone import ProcessRef

_MAX_FRAMES = 64
_OUTPUT_LIMIT = 256 << 10


@cache
def stack_tool() -> str | None:
    """The path of eu-stack on this host, None if there is none. Looked for once."""
    return shutil.which("eu-stack")


def stack_command(process: ProcessRef, tool: str | None = None) -> tuple[str, ...] | None:
    """The command that prints the user stacks of a process; None where the host has no tool for it.

    Debugging files are looked for where the host keeps them, never beside the zone's binaries.
    """
    tool = tool or stack_tool()
    if tool is None:
        return None
    return (tool, "-n", str(_MAX_FRAMES), "--debuginfo-path=/usr/lib/debug", "-p", str(process.pid))


def stack_text(output: bytes) -> bytes:
    """The output of the tool, bounded and escaped: it is made of symbol and file names that the zone chose."""
    lines = output[:_OUTPUT_LIMIT].split(b"\n")
    return "\n".join(map(printable, lines)).encode()


def is_stopped(process: ProcessRef) -> bool:
    """Whether the process is stopped by a signal; to be asked before the tool starts, for `resume`."""
    fields = proc.read_stat(process.pid)
    return fields is not None and fields[proc.STATE] == "T"


def resume(process: ProcessRef) -> None:
    """Continue a process whose tool was killed, unless it was stopped before.

    Attaching sends the process SIGSTOP. If the tool dies before it has taken that in, the process stays stopped for
    ever: 7 times out of 300 when eu-stack is killed at a random moment. SIGCONT takes back one that is on its way too.
    """
    proc.send_signal(process, signal.SIGCONT)
