"""The walk through a snapshot: which files, in which order, and how much memory."""

import contextlib
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sealing import Seal
from support.spooled import INSTALLATION, MTIME_NS, Draft, SpoolDir
from zonebundle.host.files import open_root
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area, Limits, SnapshotTree
from zonebundle.model.zone import LogTree
from zonebundle.seal import plan as plan_module
from zonebundle.seal.areas import OpenAreas
from zonebundle.seal.entry import SpoolEntry
from zonebundle.seal.plan import PlannedLog, plan
from zonebundle.seal.report import Gaps
from zonebundle.snapshots.areas import prepare_area
from zonebundle.snapshots.base import OpenTree
from zonebundle.snapshots.btrfs import create_subvolume, take_btrfs


class Snapshot:
    """A draft that reads from a directory which stands for a snapshot."""

    def __init__(self, at: SpoolDir, patterns: tuple[str, ...] = ("logs/**",), limits: Limits | None = None) -> None:
        self.draft = Draft(at, limits=limits or Limits())
        self.area = at.staging / snapshot_name(INSTALLATION, self.draft.bundle_id)
        prepare_area(self.area, INSTALLATION)
        self.top = self.area / "snapshot/srv/web/logs"
        self.top.mkdir(parents=True)
        number = self.draft.add_area(Area("btrfs", str(self.area), self.draft.bundle_id))
        self.draft.add_tree(SnapshotTree(number, "srv/web/logs", "zone", "logs", patterns, str(at.zone_root)))

    def add(self, name: str, data: bytes = b"content", age: int = 0) -> Path:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(MTIME_NS, MTIME_NS - age * 10**9))
        return path

    @contextlib.contextmanager
    def plan(self) -> Iterator[tuple[Iterator[PlannedLog], Gaps]]:
        self.draft.write()
        entry = SpoolEntry(self.draft.at.spool, self.draft.bundle_id)
        record = entry.read_record()
        with OpenAreas(record.areas) as areas, plan(entry, record, areas) as planned:
            yield planned.logs, record.gaps


def test_logs_of_a_snapshot_come_newest_first(at: SpoolDir, seal: Seal) -> None:
    snapshot = Snapshot(at)
    for age, name in enumerate(["app.log", "deep/er/x.log", "app.log.1", "app.log.2"]):
        snapshot.add(name, name.encode(), age)
    seal(snapshot.draft)
    assert at.logs(snapshot.draft) == {
        b"zone/logs/app.log": b"app.log",
        b"zone/logs/deep/er/x.log": b"deep/er/x.log",
        b"zone/logs/app.log.1": b"app.log.1",
        b"zone/logs/app.log.2": b"app.log.2",
    }
    assert list(at.logs(snapshot.draft)) == [
        b"zone/logs/app.log",
        b"zone/logs/deep/er/x.log",
        b"zone/logs/app.log.1",
        b"zone/logs/app.log.2",
    ]
    assert at.left() == []


def test_only_wanted_regular_files_are_taken(at: SpoolDir, seal: Seal, tmp_path: Path) -> None:
    snapshot = Snapshot(at, patterns=("logs/*.log", "logs/sub/**"))
    snapshot.add("app.log")
    snapshot.add("app.txt")
    snapshot.add("deep/app.log")
    snapshot.add("sub/a/b")
    snapshot.add("sub/system.journal")
    (tmp_path / "secret").write_text("secret")
    (snapshot.top / "link.log").symlink_to(tmp_path / "secret")
    (snapshot.top / "sub/link").symlink_to(tmp_path)
    os.mkfifo(snapshot.top / "fifo.log")
    seal(snapshot.draft)
    assert sorted(at.logs(snapshot.draft)) == [b"zone/logs/app.log", b"zone/logs/sub/a/b"]


def test_names_of_any_bytes_are_found(at: SpoolDir, seal: Seal) -> None:
    snapshot = Snapshot(at)
    names = [b"a\nb.log", b"\xff\xfe", b"\x1b[2J", b"-x", b"x" * 255]
    for name in names:
        snapshot.add(os.fsdecode(name), name)
    seal(snapshot.draft)
    assert at.logs(snapshot.draft) == {b"zone/logs/" + name: name for name in names}


def test_a_file_linked_twice_is_taken_once(at: SpoolDir, seal: Seal) -> None:
    snapshot = Snapshot(at)
    os.link(snapshot.add("a.log"), snapshot.top / "b.log")
    seal(snapshot.draft)
    assert len(at.logs(snapshot.draft)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="changing owners needs root")
def test_a_linked_file_of_another_owner_is_a_gap(at: SpoolDir) -> None:
    snapshot = Snapshot(at)
    path = snapshot.add("shadow.log")
    os.link(path, snapshot.area / "elsewhere")
    os.chown(path, 12345, 12345)
    with snapshot.plan() as (logs, gaps):
        assert list(logs) == []
        assert [gap.what for gap in gaps.listed()] == ["pstack.7", "logs/zone/logs/shadow.log"]


def test_the_tail_of_a_large_file_is_kept(at: SpoolDir, seal: Seal) -> None:
    snapshot = Snapshot(at, limits=Limits(file=10))
    snapshot.add("app.log", b"0123456789abcdef")
    seal(snapshot.draft)
    assert at.logs(snapshot.draft) == {b"zone/logs/app.log.from-6": b"6789abcdef"}


def test_a_snapshot_without_the_tree_is_a_gap(at: SpoolDir) -> None:
    snapshot = Snapshot(at)
    shutil.rmtree(snapshot.top)
    with snapshot.plan() as (logs, gaps):
        assert list(logs) == []
        assert "cannot be opened" in gaps.listed()[-1].reason


def test_many_files_are_sorted_in_little_memory(at: SpoolDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_SORTED_AT_ONCE", 100)
    snapshot = Snapshot(at)
    for number in range(1050):
        snapshot.add(f"{number * 7919 % 1050:04}.log", b"", age=number * 7919 % 1050)
    with snapshot.plan() as (logs, _):
        tracemalloc.start()
        names = [planned.path.decode() for planned in logs]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert names == [f"logs/zone/logs/{number:04}.log" for number in range(1050)]
    assert peak < 1 << 20
    # Runs that were written to sort them are gone.
    assert sorted(path.name for path in snapshot.draft.entry.iterdir()) == ["capture.jsonl", "intent.json", "outputs"]


def test_a_real_btrfs_snapshot(btrfs_dir: Path, seal: Seal, at: SpoolDir) -> None:
    on_btrfs = SpoolDir(btrfs_dir).make()
    root = open_root(str(btrfs_dir))
    try:
        create_subvolume(root, "zone")
    finally:
        os.close(root)
    logs = btrfs_dir / "zone/logs"
    logs.mkdir()
    (logs / "app.log").write_bytes(b"before")
    draft = Draft(at)
    area = on_btrfs.staging / snapshot_name(INSTALLATION, draft.bundle_id)
    prepare_area(area, INSTALLATION)
    tree = LogTree("zone", str(logs), ("logs/**",), "logs")
    descriptor = open_root(str(logs))
    try:
        taken = take_btrfs(OpenTree(tree, descriptor), area, INSTALLATION)
    finally:
        os.close(descriptor)
    (logs / "app.log").write_bytes(b"after")
    (logs / "late.log").write_bytes(b"after")
    number = draft.add_area(Area("btrfs", str(area), draft.bundle_id))
    draft.add_tree(SnapshotTree(number, taken.path, "zone", "logs", tree.patterns, str(logs)))
    seal(draft)
    assert at.logs(draft) == {b"zone/logs/app.log": b"before"}
    assert (at.left(), on_btrfs.left()) == ([], [])
