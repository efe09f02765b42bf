"""Bundles of a zone that has been bundled before: what do they read, compress and keep?"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.load import COMMAND, FILES, SERVICES, SETTINGS, Row, file_sizes, json_lines, work_directory, write_logs
from support.agents import IDLE, AgentProcess
from zonebundle.store.pieces import CHUNK, compress, deflate
from zonebundle.store.reader import StoreReader

BUNDLES = 10
BYTES = 100_000_000
MANY = 10_000
# Entries that are our own.
OURS = (b"metadata.toml", b"report.json", b"trace.json")


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes in a store: log content, and what belongs to single bundles; and the packed bytes of the latest's evidence
    that is no log: what probes told then is as new as a new line in a log.
    """

    segments: int
    bundles: int
    evidence: int


def second() -> Iterator[Row]:
    """The second bundle of an unchanged zone with 10,000 files of 4 to 20 KiB."""
    with work_directory() as work, AgentProcess(work, settings=SETTINGS) as agent:
        # A shell would tell the console of its children's end, and the zone would not be unchanged.
        logs = agent.add_zone("web", IDLE) / "logs"
        volume = _write_many(logs)
        agent.start()
        first = _stop(agent)
        segments = file_sizes(agent.state / "store/segments")
        # With the logs out of the page cache, who reads them reads the disk.
        _forget_cached(logs)
        changed = _ctimes(logs)
        before = _io(_sealer(agent))
        told = _stop(agent)
        after = _io(_sealer(agent))
        # A link that is made and removed changes the ctime.
        linked = sum(changed[path] != ctime for path, ctime in _ctimes(logs).items())
        made = sum(file_sizes(agent.state / "store/segments").values()) - sum(segments.values())
    what = f"second bundle of an unchanged zone, {MANY:,} files, {volume / 1e6:.0f} MB"
    from_disk, in_all = (after[name] - before[name] for name in ("read_bytes", "rchar"))
    yield Row(
        f"{what}: bytes of logs that the sealer reads",
        "0",
        f"{from_disk} from the disk (rchar {in_all / 1e6:.1f} MB: record, index)",
        from_disk == 0,
    )
    yield Row(f"{what}: files that the hold links, not known by the index's hint", "0", f"{linked:,}", linked == 0)
    yield Row(f"{what}: bytes compressed, as new segments", "0", str(made), made == 0)
    rate, first_rate = MANY / told["seal_seconds"], MANY / first["seal_seconds"]
    yield Row(
        f"{what}: its seal", ">= 5,000 files/s", f"{rate:,.0f} files/s (the first {first_rate:,.0f})", rate >= 5000
    )
    yield Row(
        f"{what}: its hold, the files known by the index / that of the first",
        "-",
        f"{told['hold_seconds'] * 1000:.0f} ms / {first['hold_seconds'] * 1000:.0f} ms",
    )


def ten() -> Iterator[Row]:
    """The storage of 10 bundles of one zone against one, unchanged and with rotations between them."""
    for rotated in (False, True):
        with work_directory() as work, AgentProcess(work, settings=SETTINGS) as agent:
            logs = agent.add_zone("web", COMMAND) / "logs"
            write_logs(logs, BYTES)
            agent.start()
            agent.start_zones()
            new = told = 0
            one = kept = _create(agent)
            for number in range(1, BUNDLES):
                if rotated:
                    new += _rotate(logs, number)
                kept = _create(agent)
                told += kept.evidence
        in_all = one.segments + one.bundles
        segments, own = kept.segments - one.segments - new, kept.bundles - one.bundles - told
        what = f"storage of {BUNDLES} bundles of one zone, {BYTES / 1e6:.0f} MB of logs"
        if rotated:
            what += f", every log rotated between them, less {new / 1e6:.2f} MB new logs"
        else:
            what += ", logs unchanged"
        what += f" (less {told / 1e3:.0f} kB new outputs)"
        ratio = (in_all + segments + own) / in_all
        reached = (
            f"{ratio:.3f} ({in_all / 1e6:.1f} MB; beyond it {own / 1e3:.0f} kB manifests and frames, "
            f"{segments / 1e3:.0f} kB segments)"
        )
        yield Row(f"{what}, / one", "<= 1.05", reached, ratio <= 1.05)


def _write_many(logs: Path) -> int:
    chance = random.Random(2)
    text = json_lines(2, 1 << 20)
    total = 0
    for number in range(MANY):
        service, age = divmod(number, 40)
        size = chance.randint(4 << 10, 20 << 10)
        at = chance.randrange(len(text) - size)
        head = b"file %d\n" % number
        name = f"service-{service}.log" + (f".{age}" if age else "")
        (logs / name).write_bytes(head + text[at : at + size - len(head)])
        total += size
    os.sync()
    return total


def _forget_cached(logs: Path) -> None:
    # Only clean pages can be dropped.
    os.sync()
    for path in logs.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _stop(agent: AgentProcess) -> dict[str, float]:
    """Start and stop the zone; the status of its sealed bundle."""
    agent.start_zones()
    told = agent.stop_zone("web")
    assert told["gaps"] == 0, told["reasons"][:3]
    return agent.wait_sealed("web", told["bundle"]["id"]["bundle_id"], timeout=300)


def _create(agent: AgentProcess) -> Stored:
    """Bundle the living zone; what the store holds then."""
    answer = agent.post("/zones/bundles/web").raise_for_status().json()
    agent.wait_sealed("web", answer["id"]["bundle_id"], timeout=300)
    bundle = StoreReader.open(agent.state / "store").find("web", answer["id"]["bundle_id"])
    outputs = [entry.path for entry in bundle.entries() if entry.size and not entry.pieces and entry.path not in OURS]
    segments, bundles = (sum(file_sizes(agent.state / "store" / name).values()) for name in ("segments", "bundles"))
    return Stored(segments, bundles, sum(len(compress(bundle.read_own(path))) for path in outputs))


def _rotate(logs: Path, number: int) -> int:
    """Rename every log to its next age and begin new ones; returns the packed bytes of what is new."""
    packed = 0
    for service in range(SERVICES):
        name = f"service-{service}.log"
        ages = sorted((int(path.suffix[1:]) for path in logs.glob(f"{name}.*")), reverse=True)
        for age in ages:
            (logs / f"{name}.{age}").rename(logs / f"{name}.{age + 1}")
        (logs / name).rename(logs / f"{name}.1")
        data = json_lines(1000 * number + service, BYTES // FILES)
        (logs / name).write_bytes(data)
        packed += sum(len(deflate(data[at : at + CHUNK]).data) for at in range(0, len(data), CHUNK))
    return packed


def _ctimes(logs: Path) -> dict[Path, int]:
    return {path: path.stat().st_ctime_ns for path in logs.iterdir()}


def _sealer(agent: AgentProcess) -> int:
    pid: int = agent.get("/healthz").json()["pids"]["sealer"][0]
    return pid


def _io(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}
