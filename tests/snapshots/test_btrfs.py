import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.staging import INSTALLATION, keep, new_area, opened
from zonebundle.errors import SnapshotError
from zonebundle.snapshots import btrfs
from zonebundle.snapshots.areas import destroy_area
from zonebundle.snapshots.base import Kind, StagingRules
from zonebundle.snapshots.btrfs import BtrfsSnapshot, commit, find_place, holds_subvolumes, take_btrfs
from zonebundle.snapshots.choose import choose, forget


def _subvolume(path: Path) -> Path:
    subprocess.run(["btrfs", "-q", "subvolume", "create", path], check=True)
    return path


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _take(path: Path, staging: Path) -> BtrfsSnapshot:
    area = new_area(staging, "btrfs")
    with opened(path) as tree:
        return take_btrfs(tree, Path(area.path), INSTALLATION)


def test_a_snapshot_is_read_only_and_of_one_instant(btrfs_dir: Path, leak_check: None) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / "var/log").mkdir(parents=True)
    (zone / "var/log/app.log").write_bytes(b"before")
    taken = _take(zone / "var/log", btrfs_dir / "staging")
    (zone / "var/log/app.log").write_bytes(b"after")
    assert taken.path == "var/log"
    assert (taken.snapshot / taken.path / "app.log").read_bytes() == b"before"
    with pytest.raises(OSError, match="Read-only"):
        (taken.snapshot / "new").touch()


def test_the_top_of_a_subvolume_has_an_empty_path(btrfs_dir: Path) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    assert _take(zone, btrfs_dir / "staging").path == ""


def test_a_directory_of_the_top_subvolume(btrfs_dir: Path, leak_check: None) -> None:
    # No subvolume of its own: the whole file system's top is snapshot, which costs the same.
    (btrfs_dir / "zone").mkdir()
    (btrfs_dir / "zone" / "app.log").write_bytes(b"x")
    taken = _take(btrfs_dir / "zone", btrfs_dir / "staging")
    assert taken.path == f"{btrfs_dir.name}/zone"
    assert (taken.snapshot / taken.path / "app.log").read_bytes() == b"x"


def test_a_hundred_million_bytes_take_no_longer(btrfs_dir: Path) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    with (zone / "big.log").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 100 << 20)
        os.fsync(file.fileno())
    taken = _take(zone, btrfs_dir / "staging")
    assert (taken.snapshot / "big.log").stat().st_size == 100 << 20


@pytest.mark.parametrize("name", ["new\nline", "\udcff\udcfe", "é" * 100, "a b"])
def test_paths_of_any_bytes(btrfs_dir: Path, name: str) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / name / "log").mkdir(parents=True)
    assert _take(zone / name / "log", btrfs_dir / "staging").path == f"{name}/log"


def test_the_path_is_that_in_the_snapshot_whatever_is_renamed(btrfs_dir: Path) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / "log").mkdir()
    area = new_area(btrfs_dir / "staging", "btrfs")
    with opened(zone / "log") as tree:
        (zone / "log").rename(zone / "elsewhere")
        (zone / "log").mkdir()
        taken = take_btrfs(tree, Path(area.path), INSTALLATION)
    assert taken.path == "elsewhere"


def test_a_zone_that_renames_all_the_time(btrfs_dir: Path, leak_check: None) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / "log").mkdir()
    (zone / "log" / "app.log").write_bytes(b"x")
    stop = threading.Event()

    def rename() -> None:
        while not stop.is_set():
            (zone / "log").rename(zone / "gol")
            (zone / "gol").rename(zone / "log")

    descriptor = os.open(zone / "log", os.O_RDONLY | os.O_DIRECTORY)
    thread = threading.Thread(target=rename)
    thread.start()
    try:
        for _ in range(20):
            area = new_area(btrfs_dir / "staging", "btrfs")
            with opened(zone) as tree:
                taken = take_btrfs(type(tree)(tree.tree, descriptor), Path(area.path), INSTALLATION)
            assert (taken.snapshot / taken.path / "app.log").read_bytes() == b"x"
            destroy_area(area, INSTALLATION)
    finally:
        stop.set()
        thread.join()
        os.close(descriptor)


def test_a_deleted_directory_has_no_snapshot(btrfs_dir: Path, leak_check: None) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / "log").mkdir()
    area = new_area(btrfs_dir / "staging", "btrfs")
    with opened(zone / "log") as tree:
        shutil.rmtree(zone / "log")
        with pytest.raises(SnapshotError, match="no snapshot of"):
            take_btrfs(tree, Path(area.path), INSTALLATION)
    assert os.listdir(area.path) == ["owner.json"]


def test_nested_subvolumes_are_staged_instead(btrfs_dir: Path, leak_check: None) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / "log").mkdir()
    (zone / "log/app.log").write_bytes(b"outer")
    rules = StagingRules(state_dir=str(btrfs_dir), zone_roots=(str(zone),))
    forget()
    with _descriptor(zone / "log") as descriptor:
        assert choose(descriptor, str(zone / "log"), rules).kind is Kind.BTRFS
        _subvolume(zone / "beside")
        assert choose(descriptor, str(zone / "log"), rules).kind is Kind.BTRFS
        _subvolume(zone / "log/nested")
        (zone / "log/nested/app.log").write_bytes(b"inner")
        choice = choose(descriptor, str(zone / "log"), rules)
        assert (choice.kind, choice.group) == (Kind.REFLINK, None)
    with pytest.raises(SnapshotError, match="nested below it"):
        _take(zone / "log", btrfs_dir / "staging")
    kept = keep(zone, btrfs_dir / "staging", choice.kind)
    assert kept.contents == {"log/app.log": b"outer", "log/nested/app.log": b"inner"}
    assert kept.gaps == []


def test_a_remembered_choice_has_the_path_of_now(btrfs_dir: Path) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / "log").mkdir()
    rules = StagingRules(state_dir=str(btrfs_dir), zone_roots=(str(zone),))
    forget()
    with _descriptor(zone / "log") as descriptor:
        assert choose(descriptor, "/log", rules).subpath == "log"
        (zone / "log").rename(zone / "elsewhere")
        assert choose(descriptor, "/log", rules).subpath == "elsewhere"


def test_inodes_of_nested_subvolumes_are_not_mixed_up(btrfs_dir: Path) -> None:
    # The first file of each subvolume has the same inode number.
    zone = _subvolume(btrfs_dir / "zone")
    for name in ("a", "b", "c"):
        _subvolume(zone / name)
        (zone / name / "app.log").write_bytes(name.encode())
    kept = keep(zone, btrfs_dir / "staging", Kind.REFLINK)
    assert len({log.inode for log in kept.logs}) == 1
    assert kept.contents == {f"{name}/app.log": name.encode() for name in ("a", "b", "c")}


@pytest.mark.slow
def test_many_subvolumes_beside_it_are_looked_through(btrfs_dir: Path) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / "log").mkdir()
    with _descriptor(zone) as top, _descriptor(zone / "log") as log:
        for number in range(300):
            btrfs.create_subvolume(top, f"s{number}")
        assert not holds_subvolumes(log)
        assert holds_subvolumes(top)
        btrfs.create_subvolume(log, "nested")
        assert holds_subvolumes(log)


def test_the_group_is_the_subvolume(btrfs_dir: Path) -> None:
    places = {}
    for path in (_subvolume(btrfs_dir / "one"), btrfs_dir / "one/log", _subvolume(btrfs_dir / "two")):
        path.mkdir(exist_ok=True)
        with _descriptor(path) as descriptor:
            places[path.name] = find_place(descriptor)
    assert places["one"].key == places["log"].key != places["two"].key
    assert [places[name].path for name in ("one", "log", "two")] == ["", "log", ""]


def test_an_area_holds_one_snapshot(btrfs_dir: Path, leak_check: None) -> None:
    one, two = _subvolume(btrfs_dir / "one"), _subvolume(btrfs_dir / "two")
    area = new_area(btrfs_dir / "staging", "btrfs")
    (one / "app.log").write_bytes(b"first")
    with opened(one) as tree:
        take_btrfs(tree, Path(area.path), INSTALLATION)
    with opened(two) as tree, pytest.raises(SnapshotError, match="holds a snapshot already"):
        take_btrfs(tree, Path(area.path), INSTALLATION)
    assert Path(area.path, "snapshot", "app.log").read_bytes() == b"first"


def test_other_areas_and_other_filesystems_are_refused(btrfs_dir: Path, ext4_dir: Path, leak_check: None) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    with opened(zone) as tree:
        with pytest.raises(SnapshotError, match="is not an area of"):
            take_btrfs(tree, btrfs_dir, INSTALLATION)
        area = new_area(ext4_dir / "staging", "btrfs")
        with pytest.raises(SnapshotError, match="no snapshot of"):
            take_btrfs(tree, Path(area.path), INSTALLATION)
    with opened(ext4_dir) as tree, pytest.raises(SnapshotError, match="no snapshot of"):
        take_btrfs(tree, Path(area.path), INSTALLATION)


def test_a_subvolume_out_of_reach_is_refused(btrfs_dir: Path, leak_check: None) -> None:
    zone = _subvolume(btrfs_dir / "zone")
    (zone / "log").mkdir()
    seen = btrfs_dir / "seen"
    seen.mkdir()
    subprocess.run(["mount", "--bind", zone / "log", seen], check=True)
    try:
        with pytest.raises(SnapshotError, match="out of reach"):
            _take(seen, btrfs_dir / "staging")
        forget()
        with _descriptor(seen) as descriptor:
            choice = choose(descriptor, str(seen), StagingRules(state_dir=str(btrfs_dir)))
        assert choice.kind is Kind.REFLINK
    finally:
        subprocess.run(["umount", seen], check=True)


def test_a_commit_is_for_btrfs_only(btrfs_dir: Path, ext4_dir: Path, xfs_dir: Path) -> None:
    with _descriptor(btrfs_dir) as descriptor:
        commit(descriptor)
    for directory in (ext4_dir, xfs_dir):
        with _descriptor(directory) as descriptor, pytest.raises(OSError, match="Inappropriate ioctl"):
            commit(descriptor)
