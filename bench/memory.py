"""The memory of sealer and agent while one very large log is sealed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from bench.load import SETTINGS, Row, chunk, work_directory
from support.agents import IDLE, AgentProcess
from zonebundle.store.pieces import CHUNK

SIZE = 31_000_000_000
PARTS = 64
PART_CHUNKS = 16


def memory() -> Iterator[Row]:
    """Sealing a sparse log of 31 GB that has 1 GB of data."""
    with work_directory() as work, AgentProcess(work, settings=SETTINGS) as agent:
        _write_sparse(agent.add_zone("web", IDLE) / "logs" / "app.log.1")
        agent.start()
        agent.start_zones()
        pids = agent.get("/healthz").json()["pids"]
        before = {name: _peak(pids[name][0]) for name in ("sealer", "agent")}
        told = agent.stop_zone("web")
        status = agent.wait_sealed("web", told["bundle"]["id"]["bundle_id"], timeout=300)
        assert agent.get("/healthz").json()["pids"]["sealer"] == pids["sealer"], "the sealer was started anew"
        peak = {name: _peak(pids[name][0]) for name in ("sealer", "agent")}
        gaps = status["gaps"]
    what = f"sealing one log of {SIZE / 1e9:.0f} GB, {PARTS * PART_CHUNKS * CHUNK / 1e9:.1f} GB of it data"
    if gaps:
        what += f" (with {len(gaps)} gaps!)"
    for name, target in (("sealer", 150), ("agent", 100)):
        yield Row(
            f"{what}: peak of the {name}, resident",
            f"<= {target} MB",
            f"{peak[name] / 1e6:.0f} MB ({before[name] / 1e6:.0f} MB before)",
            peak[name] <= target * 1_000_000,
        )
    yield Row(f"{what}: the seal", "-", f"{status['seal_seconds']:.1f} s")


def _write_sparse(path: Path) -> None:
    with path.open("wb") as file:
        for part in range(PARTS):
            file.seek(part * (SIZE // PARTS) // CHUNK * CHUNK)
            for position in range(PART_CHUNKS):
                file.write(chunk(part * PART_CHUNKS + position))
        file.truncate(SIZE)
    os.sync()


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no VmHWM")
