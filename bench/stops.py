"""Many zones stopped at once: what do their bundles cost on top of the stops?"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import COMMAND, FILES, Row, one_lock_gzip, write_logs
from support.agents import AgentProcess
from zonebundle.host import proc

ZONES = 50
ROUNDS = 4
BYTES = 10_000_000


def stops() -> Iterator[Row]:
    """50 zones of 5 processes and 200 log files, stopped at once, with and without bundles in turn.

    First with logs that nobody has seen, as on a host that has just come up; then with rotated logs that are in the
    store, as seal-ahead has them half a minute later, and any earlier bundle.
    """
    with tempfile.TemporaryDirectory(prefix="zb-bench-") as work, AgentProcess(Path(work)) as agent:
        names = [f"zone-{number:02}" for number in range(ZONES)]
        for name in names:
            write_logs(agent.add_zone(name, COMMAND) / "logs", BYTES)
        # What is seen is up to this benchmark, not to a timer.
        agent.settings = '[evidence]\nstacks = "kernel"\n[seal]\nahead = "0s"\n'
        agent.start()
        new = _measure(agent, names, keep=False)
        yield from _rows(new, "new logs")
        known = _measure(agent, names, keep=True)
        yield from _rows(known, "known logs")
        old = one_lock_gzip(sorted((agent.directory / "zones" / names[0] / "logs").iterdir())) * ZONES
        for result, which in ((new, "new logs"), (known, "known logs")):
            sooner = old / statistics.median(result.wall[True])
            yield Row(
                f"the same, one lock and gzip -9 (one zone measured, times {ZONES}) / ours, {which}",
                ">= 100",
                f"{sooner:.0f} ({old:.1f} s)",
                sooner >= 100,
            )


@dataclass(slots=True)
class _Measured:
    """CPU and wall time (s) of all stops at once, by whether there were bundles; the holds of those with (s)."""

    cpu: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    wall: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    holds: list[float] = field(default_factory=list)


def _measure(agent: AgentProcess, names: list[str], *, keep: bool) -> _Measured:
    """`keep` leaves the bundles in the store: their logs are known in the next round."""
    measured = _Measured()
    for round_number in range(ROUNDS + 1):
        for bundle in (False, True):
            asyncio.run(_start_all(agent, names))
            before, begin = _cpu_seconds(agent), time.monotonic()
            answers = asyncio.run(_stop_all(agent, names, bundle))
            spent, took = _cpu_seconds(agent) - before, time.monotonic() - begin
            for answer in answers:
                if answer["bundle"]:
                    agent.wait_sealed(answer["zone"], answer["bundle"]["id"]["bundle_id"], timeout=600)
                    if not keep:
                        agent.delete(f"/zones/bundles/{answer['zone']}/{answer['bundle']['id']['bundle_id']}")
            if round_number:
                measured.cpu[bundle].append(spent)
                measured.wall[bundle].append(took)
                measured.holds += [answer["hold_seconds"] for answer in answers if bundle]
    return measured


def _rows(measured: _Measured, which: str) -> Iterator[Row]:
    on_top = (statistics.mean(measured.cpu[True]) - statistics.mean(measured.cpu[False])) / ZONES * 1000
    what = f"CPU of a bundle on top of a stop, {ZONES} zones at once, {FILES} files each, {which}"
    yield Row(what, "<= 15 ms a zone", f"{on_top:.1f} ms a zone", on_top <= 15)
    yield Row(
        f"{ZONES} zones stopped at once: wall time with bundles / without, {which}",
        "-",
        f"{statistics.median(measured.wall[True]):.2f} s / {statistics.median(measured.wall[False]):.2f} s",
    )
    yield Row(f"hold of one of them, median, {which}", "-", f"{statistics.median(measured.holds) * 1000:.0f} ms")


async def _start_all(agent: AgentProcess, names: list[str]) -> None:
    async with agent.async_client(timeout=300) as client:
        for answer in await asyncio.gather(*(client.post(f"/zones/{name}/start") for name in names)):
            answer.raise_for_status()


async def _stop_all(agent: AgentProcess, names: list[str], bundle: bool) -> list[dict[str, Any]]:
    parameters = {"bundle": str(bundle).lower()}
    async with agent.async_client(timeout=300) as client:
        answers = await asyncio.gather(*(client.post(f"/zones/{name}/stop", params=parameters) for name in names))
    return [answer.raise_for_status().json() for answer in answers]


def _cpu_seconds(agent: AgentProcess) -> float:
    """CPU of the stop path so far: the agent, the hold server, its workers, and those of them that have ended."""
    pids = agent.get("/healthz").json()["pids"]
    server = pids["hold"][0]
    ticks = 0
    for pid, with_children in (
        (agent.pid, False),
        (server, True),
        *((worker, False) for worker in proc.children(server)),
    ):
        fields = proc.read_stat(pid)
        if fields is not None:
            ticks += sum(int(field) for field in fields[11 : 15 if with_children else 13])
    return ticks / os.sysconf("SC_CLK_TCK")
