"""Processes to be probed, and what the probes of them told."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from zonebundle.capture.probe_result import Probe, ProbeResult
from zonebundle.capture.probes import process_probes
from zonebundle.host import proc
from zonebundle.model.zone import Incarnation, ProcessRef, Zone

# Prints a line when it is up, as every script given to `starting` has to.
SLEEP = "import time; print('up', flush=True); time.sleep(1000)"
ONE_MORE_THREAD = "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"

Start = Callable[..., ProcessRef]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    """A function that runs a Python script, returns when it has printed a line, and tells the process."""
    with contextlib.ExitStack() as stack:

        def begin(script: str = SLEEP, *arguments: str) -> ProcessRef:
            argv = [sys.executable, "-c", script, *arguments]
            child = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd="/")
            stack.callback(_end, child)
            assert child.stdout is not None
            child.stdout.readline()
            return identified(child.pid)

        yield begin


def _end(child: subprocess.Popen[bytes]) -> None:
    with child:
        child.kill()


def identified(pid: int) -> ProcessRef:
    """The process that has this PID now."""
    found = proc.identify(pid)
    assert found is not None
    return found


def zone(init: ProcessRef | None = None) -> Zone:
    """A zone that runs, with this first process."""
    return Zone("web", "process", "running", Incarnation(proc.boot_id(), init) if init else None)


def run(probes: Sequence[Probe]) -> dict[str, ProbeResult]:
    """What the probes told, by their names without the PID."""
    results = [probe.run() for probe in probes]
    assert [result.name for result in results] == [probe.name for probe in probes]
    return {result.name.partition(".")[0]: result for result in results}


def one(process: ProcessRef) -> dict[str, ProbeResult]:
    """What the probes of one process told."""
    return run(process_probes(zone(), process))


def body(result: ProbeResult) -> list[str]:
    """The lines below the one that says what it is."""
    return result.text.decode().splitlines()[1:]
