"""The old way, for comparison: a bundle inside the stop, one zone after the other, as Omicron's zone bundles are made.

One lock around the whole creation, one thread, Python's tarfile with gzip at its best level. Only the logs are bundled,
no command is run and nothing is copied to a second disk: the real thing takes longer.
"""

from __future__ import annotations

import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LEVEL = 9
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Baseline:
    """How long zones wait for their release the old way; `measured` of them really did, the others by their bytes."""

    measured: int
    measured_seconds: float
    release_seconds: tuple[float, ...]


def bundle_the_old_way(logs: Sequence[Path], target: Path) -> float:
    """Bundle one zone's logs; the seconds that its stop waits."""
    begin = time.perf_counter()
    with _lock, tarfile.open(target, "w:gz", compresslevel=_LEVEL) as archive:
        for log in logs:
            archive.add(log, arcname=log.name, recursive=False)
    return time.perf_counter() - begin


def measure_baseline(logs: Mapping[str, Sequence[Path]], number: int, directory: Path) -> Baseline:
    """Stop all zones of `logs` the old way: `number` of them for real, the others extrapolated by their bytes."""
    sizes = {zone: sum(log.stat().st_size for log in files) for zone, files in logs.items()}
    seconds: dict[str, float] = {}
    for zone in list(logs)[:number]:
        target = directory / f"{zone}.tar.gz"
        seconds[zone] = bundle_the_old_way(logs[zone], target)
        target.unlink()
    total = sum(seconds.values())
    pace = total / max(1, sum(sizes[zone] for zone in seconds))
    waited, released = 0.0, []
    for zone, size in sizes.items():
        # The lock is handed on: each zone waits for those before it too.
        waited += seconds.get(zone, size * pace)
        released.append(waited)
    return Baseline(len(seconds), total, tuple(released))
