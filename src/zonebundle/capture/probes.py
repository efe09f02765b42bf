"""Probes: looks at a zone's processes from the host through /proc. Nothing is run, nothing is written, nothing stopped.

What a probe shows was written by strangers: it is bounded, and control characters are escaped. The environment is never
read. What the host lacks, or does not let us see, is a skip with its reason; a process that is gone is one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from zonebundle.capture import probe_logins, probe_process, probe_sockets, probe_zone
from zonebundle.capture.probe_result import Probe, ProbeResult, make_probe
from zonebundle.capture.probe_stacks import stack_command
from zonebundle.capture.process_view import ProcessView
from zonebundle.model.zone import ProcessRef, Zone

__all__ = ["Probe", "ProbeResult", "probe_groups", "process_probes", "stack_command", "zone_probes"]

# Each view of a process is some ten reads of /proc: a zone of thousands is shown by its first.
MAX_PROCESSES = 1000


def probe_groups(zone: Zone, processes: Sequence[ProcessRef]) -> list[list[Probe]]:
    """All probes of a zone, in groups that are each to be run in their order in one thread, several groups at once.

    First the zone-wide ones, then a group for each process. What two of them need is read once. Within a group the
    probes that might have to wait for a process (its arguments, while it is stuck in a page fault) come last.
    """
    views = [ProcessView(process) for process in processes[:MAX_PROCESSES]]
    return [_zone_wide(zone, views), *(_of_process(view) for view in views)]


def zone_probes(zone: Zone, processes: Sequence[ProcessRef]) -> list[Probe]:
    """The zone-wide probes: uptime, svcs, netstat, who, last, ptree."""
    return _zone_wide(zone, [ProcessView(process) for process in processes[:MAX_PROCESSES]])


def process_probes(zone: Zone, process: ProcessRef) -> list[Probe]:
    """The probes of one process: pstack.<pid>, pfiles.<pid>, pargs.<pid>."""
    return _of_process(ProcessView(process))


def _zone_wide(zone: Zone, views: Sequence[ProcessView]) -> list[Probe]:
    init = zone.incarnation.init if zone.incarnation is not None else None
    return [
        make_probe(("uptime",), partial(probe_zone.uptime, views, init)),
        make_probe(("svcs",), partial(probe_zone.svcs, views)),
        make_probe(("netstat",), partial(probe_sockets.netstat, views)),
        make_probe(("who",), partial(probe_logins.who, views)),
        make_probe(("last",), partial(probe_logins.last, views)),
        make_probe(("ptree",), partial(probe_zone.ptree, views)),
    ]


def _of_process(view: ProcessView) -> list[Probe]:
    pid = str(view.process.pid)
    return [
        make_probe(("pstack", pid), partial(probe_process.pstack, view)),
        make_probe(("pfiles", pid), partial(probe_process.pfiles, view)),
        make_probe(("pargs", pid), partial(probe_process.pargs, view)),
    ]
