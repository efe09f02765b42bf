"""Probes of a whole zone: its process tree, its age and load, its services."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from zonebundle.capture.probe_result import Skipped
from zonebundle.capture.process_view import Basics, Gone, ProcessView, Stat, opened, read_at, title
from zonebundle.model.metadata import format_time
from zonebundle.model.paths import printable
from zonebundle.model.zone import ProcessRef

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_DEEPEST_INDENT = 40
_COMMAND_LIMIT = 4096
_UNITS = (b".service", b".scope")


def _living(views: Sequence[ProcessView]) -> list[tuple[ProcessView, Basics]]:
    found = []
    for view in views:
        try:
            found.append((view, view.basics()))
        except Gone:
            continue
    if not found:
        raise Skipped("no process of the zone runs")
    return found


def _note_gone(views: Sequence[ProcessView], living: Sequence[object]) -> Iterator[str]:
    if len(living) < len(views):
        yield f"({len(views) - len(living)} of {len(views)} processes are gone)"


def ptree(views: Sequence[ProcessView]) -> Iterator[str]:
    """The processes as a tree of PIDs and command lines; a process whose parent is not the zone's begins a tree."""
    living = _living(views)
    pids = {view.process.pid for view, _ in living}
    below: dict[int, list[tuple[ProcessView, Stat]]] = {}
    for view, basics in living:
        parent = basics.stat.parent
        below.setdefault(parent if parent in pids else 0, []).append((view, basics.stat))
    shown = set()
    # Parents are read at slightly different moments: a loop of them must neither hang nor hide anybody.
    for top in [*below.get(0, ()), *((view, basics.stat) for view, basics in living)]:
        pending = [(top, 0)]
        while pending:
            (view, stat), depth = pending.pop()
            if view.process in shown:
                continue
            shown.add(view.process)
            yield f"{'  ' * min(depth, _DEEPEST_INDENT)}{view.process.pid:<5d} {_title(view, stat)}"
            pending.extend((child, depth + 1) for child in reversed(below.get(view.process.pid, ())))
    yield from _note_gone(views, living)


def _title(view: ProcessView, stat: Stat) -> str:
    if stat.state == "D":
        # Reading its arguments takes the lock of its memory, which a process stuck in a page fault may hold.
        return f"[{printable(stat.name)}] (uninterruptible sleep)"
    try:
        with opened(view.process, check_after=False) as found:
            return title(stat.name, read_at(found.content, "cmdline", _COMMAND_LIMIT))
    except Gone:
        return f"[{printable(stat.name)}] (gone)"
    except PermissionError:
        return f"[{printable(stat.name)}]"


def uptime(views: Sequence[ProcessView], init: ProcessRef | None) -> Iterator[str]:
    """How long the zone runs, how many processes it has and what they used, and the same of the host."""
    living = _living(views)
    with open("/proc/uptime", "rb") as file:
        host = float(file.read().split()[0])
    with open("/proc/loadavg", "rb") as file:
        load = file.read().split()
    stats = [basics.stat for _, basics in living]
    first = init.start_time if init is not None else min(stat.start_time for stat in stats)
    up = max(0.0, host - first / _TICKS)
    user = sum(stat.user for stat in stats) / _TICKS
    system = sum(stat.system for stat in stats) / _TICKS
    # `resident` counts shared pages once in every process.
    resident = sum(stat.resident for stat in stats) * _PAGE
    yield f"zone:      up {_span(up)}, since {format_time(time.time() - up)}"
    yield f"processes: {len(stats)}, threads: {sum(stat.threads for stat in stats)}"
    share = (user + system) / max(up, 0.01)
    yield f"cpu:       user {user:.2f} s, system {system:.2f} s, {share:.3f} of a CPU since then"
    yield f"memory:    {resident >> 20} MiB resident, shared pages counted in each process"
    yield f"host:      up {_span(host)}, load average: {b', '.join(load[:3]).decode('ascii', 'replace')}"
    yield from _note_gone(views, living)


def _span(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} days, " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def svcs(views: Sequence[ProcessView]) -> Iterator[str]:
    """The units of a service manager, found in the cgroups of the processes, each with its processes."""
    units: dict[bytes, list[tuple[int, bytes]]] = {}
    living = _living(views)
    for view, basics in living:
        if path := _unit_path(basics.cgroup):
            units.setdefault(path, []).append((view.process.pid, basics.stat.name))
    if not units:
        raise Skipped("no service manager's unit among the cgroups of the zone's processes")
    for path, members in units.items():
        yield f"{printable(path.rpartition(b'/')[2])}  {printable(path)}"
        yield from (f"    {pid:>7d} {printable(name)}" for pid, name in members)
    yield from _note_gone(views, living)


def _unit_path(cgroup: bytes) -> bytes:
    """The cgroup path up to its innermost unit: of systemd's own hierarchy, of the unified one where that is absent.

    Lines are `hierarchy:controllers:path` (cgroups(7)).
    """
    found = b""
    for line in cgroup.split(b"\n"):
        _, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        if controllers in (b"name=systemd", b""):
            parts = path.split(b"/")
            while parts and not parts[-1].endswith(_UNITS):
                parts.pop()
            if parts:
                found = b"/".join(parts)
    return found
