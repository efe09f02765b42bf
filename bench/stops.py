"""Many zones stopped at once: what do their bundles cost on top of the stops?"""

from __future__ import annotations

import asyncio
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.load import COMMAND, FILES, Row, write_logs
from support.agents import AgentProcess
from zonebundle.host import proc

ZONES = 50
ROUNDS = 4
BYTES = 10_000_000


def stops() -> Iterator[Row]:
    """50 zones of 5 processes and 200 log files, stopped at once, with and without bundles in turn."""
    with tempfile.TemporaryDirectory(prefix="zb-bench-") as work, AgentProcess(Path(work)) as agent:
        names = [f"zone-{number:02}" for number in range(ZONES)]
        for name in names:
            write_logs(agent.add_zone(name, COMMAND) / "logs", BYTES)
        agent.settings = '[evidence]\nstacks = "kernel"\n'
        agent.start()
        cpu: dict[bool, list[float]] = {False: [], True: []}
        wall: dict[bool, list[float]] = {False: [], True: []}
        waits: list[float] = []
        for round_number in range(ROUNDS + 1):
            for bundle in (False, True):
                asyncio.run(_start_all(agent, names))
                before, begin = _cpu_seconds(agent), time.monotonic()
                answers = asyncio.run(_stop_all(agent, names, bundle))
                spent, took = _cpu_seconds(agent) - before, time.monotonic() - begin
                for answer in answers:
                    if answer["bundle"]:
                        agent.wait_sealed(answer["zone"], answer["bundle"]["id"]["bundle_id"], timeout=600)
                        agent.delete(f"/zones/bundles/{answer['zone']}/{answer['bundle']['id']['bundle_id']}")
                if round_number:
                    cpu[bundle].append(spent)
                    wall[bundle].append(took)
                    waits += [answer["hold_seconds"] for answer in answers if bundle]
        on_top = (statistics.mean(cpu[True]) - statistics.mean(cpu[False])) / ZONES * 1000
        what = f"CPU of a stop with a bundle on top of one without, {ZONES} zones at once, {FILES} files each"
        yield Row(what, "<= 15 ms a zone", f"{on_top:.1f} ms a zone", on_top <= 15)
        yield Row(
            f"{ZONES} zones stopped at once: wall time with bundles / without",
            "-",
            f"{statistics.median(wall[True]):.2f} s / {statistics.median(wall[False]):.2f} s",
        )
        yield Row("hold of one of them, median", "-", f"{statistics.median(waits) * 1000:.0f} ms")
        old = _old_way(agent.directory / "zones" / names[0]) * ZONES
        sooner = old / statistics.median(wall[True])
        yield Row(
            f"the same, one lock and gzip -9 (one zone measured, times {ZONES}) / ours",
            ">= 100",
            f"{sooner:.0f} ({old:.1f} s)",
            sooner >= 100,
        )


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


def _old_way(root: Path) -> float:
    """Seconds to bundle one zone as Omicron does: one thread, tar with gzip's best level."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=9) as archive:
        archive.add(root / "logs", "logs")
    return time.monotonic() - begin
