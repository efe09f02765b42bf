"""A host on which rotated logs are sealed ahead: zones that are directories, a store, a sealer in this process."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from support import stored
from support.spooled import INSTALLATION, Draft, SpoolDir, log_lines
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area, LogFile
from zonebundle.model.zone import LogTree
from zonebundle.seal import compress
from zonebundle.seal.ahead import Ahead
from zonebundle.seal.sealer import Sealer
from zonebundle.seal.storage import Storage
from zonebundle.seal.upkeep import Upkeep
from zonebundle.seal.workers import Workers
from zonebundle.snapshots.areas import destroy_area, prepare_area
from zonebundle.snapshots.base import Choice, Kind, OpenTree
from zonebundle.snapshots.staged import stage
from zonebundle.store import pieces
from zonebundle.store.pieces import CHUNK, SMALL, Run
from zonebundle.store.store import prepare


class Host:
    """A state directory with a store, a sealer in this process, and zones that are directories below `base`."""

    def __init__(self, base: Path, *more_stores: Path) -> None:
        self.at = SpoolDir(base).make()
        self.stores = [self.at.store, *more_stores]
        for store in more_stores:
            prepare(store)
        self.zones: dict[str, bool] = {}
        self.pressure = 0.0
        self.workers = Workers(2)
        self.open()

    def open(self) -> None:
        self.storage = Storage(self.at.state, self.stores)
        self.sealer = Sealer(self.at.spool, self.storage, self._destroy, self.workers)
        self.ahead = Ahead(self.storage, self.workers, pressure=lambda: self.pressure)
        self.upkeep = Upkeep(self.at.spool, self.storage, self.ahead, 1 << 30)
        self.upkeep.catch_up()

    @staticmethod
    def _destroy(area: Area, unlinked: Callable[[os.stat_result, os.stat_result], None] | None) -> None:
        destroy_area(area, INSTALLATION, unlinked)

    def restart(self) -> None:
        self.sealer.close()
        self.open()

    def close(self) -> None:
        self.sealer.close()
        self.workers.close()

    def tree(self, zone: str) -> LogTree:
        return LogTree("zone", str(self.root(zone)), ("logs/**",))

    def root(self, zone: str) -> Path:
        return self.at.zone_root / zone

    def add(self, zone: str = "web") -> Path:
        """A zone that runs; returns the directory of its logs."""
        self.zones[zone] = True
        logs = self.root(zone) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return logs

    def run(self, *, complete: bool = True, settle: bool = True, trees: list[LogTree] | None = None) -> dict[str, Any]:
        """Seal ahead, when the stamps of all logs are old enough to be trusted: what is waited for is the clock."""
        if settle:
            self.settle()
        zones = [
            {"name": name, "is_running": runs, "trees": [asdict(tree) for tree in trees or [self.tree(name)]]}
            for name, runs in self.zones.items()
        ]
        return self.upkeep.ahead(zones, complete, 1 << 50)

    def settle(self) -> None:
        youngest = max((path.lstat().st_ctime_ns for path in self.at.zone_root.rglob("*")), default=time.time_ns())
        while time.time_ns() < youngest + 25_000_000:
            time.sleep(0.005)

    def bundle(self, zone: str = "web") -> Draft:
        """Stage and seal as a stop does; the bundle has to hold what the logs hold."""
        draft = Draft(self.at, zone)
        area = self.at.staging / snapshot_name(INSTALLATION, draft.bundle_id)
        prepare_area(area, INSTALLATION)
        draft.add_area(Area("staged", str(area), draft.bundle_id))
        descriptor = os.open(self.root(zone), os.O_RDONLY | os.O_DIRECTORY)
        try:
            tree = [(OpenTree(self.tree(zone), descriptor), Choice(Kind.HARDLINK, str(self.at.staging)))]
            staged = stage(
                tree, area, 0, deadline=time.monotonic() + 60, copy_limit=1 << 30, limits=draft.limits, living=False,
                durable=False,
            )  # fmt: skip
            for item in staged:
                if isinstance(item, LogFile):
                    draft.writer.add("file", item.to_json())
        finally:
            os.close(descriptor)
        root = self.root(zone)
        draft.expected = {
            b"zone/" + os.fsencode(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and not path.is_symlink()
        }
        sealed = self.sealer.seal(draft.write(), lambda total, done: None, threading.Event())
        assert sealed is not None
        assert (sealed.left, sealed.header.gaps) == ("", 1)
        assert self.at.logs(draft) == draft.expected
        return draft

    @property
    def segments(self) -> set[str]:
        """The segments of the store, each checked to be what its name says."""
        for name in ("pruned", "tmp"):
            assert list((self.at.store / "segments" / name).iterdir()) == []
        return stored.check_segments(self.at.store)

    def known(self, path: Path) -> bool:
        """Whether the index has the file as it is now."""
        index = self.storage.index
        assert index is not None
        status = path.stat()
        found = index.find_file(os.statvfs(path).f_fsid, status.st_ino)
        return found is not None and (found.identity.size, found.identity.mtime_ns, found.identity.ctime_ns) == (
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


class Compressed:
    """What was compressed since it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        self.before: Callable[[], None] = lambda: None
        monkeypatch.setattr(compress, "deflate", self._deflate)

    def _deflate(self, raw: bytes, digest: str = "") -> Run:
        self.before()
        self.bytes += len(raw)
        return pieces.deflate(raw, digest)


def fill(logs: Path, seed: int = 0) -> int:
    """A current log, and rotated ones of each kind; returns how many bytes those have."""
    (logs / "app.log").write_bytes(log_lines(5000, seed))
    sizes = {"app.log.1": 100, "app.log.2": SMALL - 1, "app.log.3": SMALL, "app.log.4": 2 * CHUNK + 9000}
    for number, (name, size) in enumerate(sizes.items(), start=1):
        (logs / name).write_bytes(log_lines(size, 100 * seed + number))
    return sum(sizes.values())
