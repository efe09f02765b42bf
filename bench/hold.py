"""The hold of one zone: does it depend on the volume of its logs?"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.load import COMMAND, FILES, Row, median_ms, write_logs
from support import filesystems
from support.agents import AgentProcess

ROUNDS = 9
SMALL = 10_000_000
LARGE = 1_000_000_000


@contextlib.contextmanager
def _place(kind: str) -> Iterator[Path]:
    """A directory on a file system of that kind, large enough."""
    with tempfile.TemporaryDirectory(prefix="zb-bench-") as work:
        directory = Path(work)
        if kind == "plain":
            yield directory
            return
        with filesystems.mounted(kind, directory, 6 << 30) as mounted:
            if kind == "btrfs":
                subprocess.run(["btrfs", "-q", "subvolume", "create", mounted / "pool"], check=True)
                yield mounted / "pool"
            else:
                yield mounted


def hold() -> Iterator[Row]:
    """Holds of a zone with 1 GB and one with 10 MB of logs, in turn, on each kind of file system."""
    for kind in ("ext4", "xfs", "btrfs"):
        try:
            with _place(kind) as place, tempfile.TemporaryDirectory(prefix="zb-bench-") as work:
                yield from _measure(kind, place, Path(work))
        except filesystems.Unavailable as error:
            yield Row(f"hold, {kind}", "<= 1.2", f"skipped: {error}")


def _measure(kind: str, place: Path, work: Path) -> Iterator[Row]:
    with AgentProcess(work) as agent:
        for name, total in (("small", SMALL), ("large", LARGE)):
            root = agent.add_zone(name, COMMAND, root=place / name)
            write_logs(root / "logs", total)
        agent.start()
        holds: dict[str, list[float]] = {"small": [], "large": []}
        for round_number in range(ROUNDS + 1):
            for name in ("small", "large"):
                agent.start_zones(name)
                told = agent.stop_zone(name)
                bundle_id = told["bundle"]["id"]["bundle_id"]
                agent.wait_sealed(name, bundle_id, timeout=300)
                agent.delete(f"/zones/bundles/{name}/{bundle_id}")
                if round_number:
                    holds[name].append(told["hold_seconds"])
        small, large = median_ms(holds["small"]), median_ms(holds["large"])
        reached = f"{large / small:.2f} ({large:.1f} ms against {small:.1f} ms)"
        yield Row(
            f"hold with 1 GB of logs / with 10 MB, {FILES} files, {kind}", "<= 1.2", reached, large / small <= 1.2
        )
        yield Row(f"hold, 5 processes, {FILES} files, 1 GB, {kind}, idle", "<= 30 ms", f"{large:.1f} ms", large <= 30)
