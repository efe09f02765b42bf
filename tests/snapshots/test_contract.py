"""What every snapshot kind owes, on every filesystem that can have it."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.staging import INSTALLATION, Kept, keep, new_area, opened
from zonebundle.model.globs import matches_any
from zonebundle.model.record import Area
from zonebundle.snapshots.areas import destroy_area, list_areas
from zonebundle.snapshots.base import Kind
from zonebundle.snapshots.btrfs import take_btrfs

_CASES = [
    ("btrfs", Kind.BTRFS),
    ("btrfs", Kind.REFLINK),
    ("xfs", Kind.REFLINK),
    ("xfs", Kind.HARDLINK),
    ("ext4", Kind.HARDLINK),
    ("plain", Kind.HARDLINK),
    *((name, Kind.COPY) for name in ("plain", "ext4", "xfs", "btrfs", "tmpfs")),
]


@dataclass
class Place:
    """A zone's root on one filesystem, with a staging directory beside it, and a kind."""

    root: Path
    staging: Path
    kind: Kind

    def keep(self, *, durable: bool = False, living: bool = True, **fields: Any) -> Callable[[], dict[str, bytes]]:
        """Keep the logs as they are now; gives them whenever it is called."""
        if self.kind is Kind.BTRFS:
            return self._snapshot(**fields)
        kept = keep(self.root, self.staging, self.kind, durable=durable, living=living, **fields)
        assert kept.gaps == []
        assert all(part.origin == "staged" for log in kept.logs for part in log.parts)
        return lambda: kept.contents

    def _snapshot(self, patterns: tuple[str, ...] = ("**",), prefix: str = "") -> Callable[[], dict[str, bytes]]:
        area = new_area(self.staging, "btrfs")
        with opened(self.root) as tree:
            taken = take_btrfs(tree, Path(area.path), INSTALLATION)
        top = taken.snapshot / taken.path
        before = f"{prefix}/" if prefix else ""

        def contents() -> dict[str, bytes]:
            files = {before + str(path.relative_to(top)): path for path in top.rglob("*") if path.is_file()}
            return {name: path.read_bytes() for name, path in files.items() if matches_any(name, patterns)}

        return contents

    @property
    def areas(self) -> list[Area]:
        return list(list_areas(self.staging, INSTALLATION))


@pytest.fixture(params=_CASES, ids=lambda case: "-".join(case))
def place(request: pytest.FixtureRequest) -> Place:
    filesystem, kind = request.param
    fixture = "tmp_path" if filesystem == "plain" else f"{filesystem}_dir"
    directory: Path = request.getfixturevalue(fixture)
    root = directory / "zone"
    if filesystem == "btrfs":
        subprocess.run(["btrfs", "-q", "subvolume", "create", root], check=True)
    else:
        root.mkdir()
    return Place(root, directory / "staging", kind)


_LOGS = {
    "var/log/app.log": b"current\n" * 1000,
    "var/log/app.log.1": b"rotated\n" * 5000,
    "var/log/app.log.2.gz": os.urandom(70_001),
    "var/log/empty.log": b"",
    "var/log/nginx/access.log": b"x",
    "var/log/nginx/deep/er/error.log": os.urandom(4096),
    "opt/other.txt": b"not below var/log",
}


def _write(root: Path, logs: dict[str, bytes] = _LOGS) -> None:
    for name, content in logs.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_what_was_kept_stays_as_it_was(place: Place, leak_check: None) -> None:
    _write(place.root)
    kept = place.keep()
    with (place.root / "var/log/app.log").open("ab") as log:
        log.write(b"later\n")
    (place.root / "var/log/new.log").write_bytes(b"later")
    (place.root / "var/log/app.log.1").rename(place.root / "var/log/app.log.9")
    shutil.rmtree(place.root / "var/log/nginx")
    assert kept() == _LOGS


def test_it_survives_the_removal_of_the_zone(place: Place, leak_check: None) -> None:
    _write(place.root)
    kept = place.keep(durable=True, living=False)
    if place.kind is Kind.BTRFS:
        subprocess.run(["btrfs", "-q", "subvolume", "delete", place.root], check=True)
    else:
        shutil.rmtree(place.root)
    assert kept() == _LOGS


def test_only_what_the_patterns_choose_is_kept(place: Place) -> None:
    _write(place.root)
    assert set(place.keep(patterns=("var/log/**",))()) == {name for name in _LOGS if name.startswith("var/log/")}
    assert set(place.keep(patterns=("var/*/*.log", "opt/*"))()) == {
        "var/log/app.log",
        "var/log/empty.log",
        "opt/other.txt",
    }
    prefixed = place.keep(patterns=("mnt/data/opt/*",), prefix="mnt/data")
    assert prefixed() == {"mnt/data/opt/other.txt": b"not below var/log"}


def test_a_log_of_several_chunks_is_whole(place: Place) -> None:
    logs = {"big.log": os.urandom((3 << 20) + 17), "big.log.1": os.urandom((2 << 20) - 1)}
    _write(place.root, logs)
    assert place.keep()() == logs


def test_an_empty_tree_is_kept(place: Place, leak_check: None) -> None:
    assert place.keep()() == {}
    assert place.keep(patterns=("var/log/**",))() == {}


def test_destroying_leaves_nothing_and_costs_no_log(place: Place, leak_check: None) -> None:
    _write(place.root)
    place.keep()
    place.keep()
    areas = place.areas
    assert len(areas) == 2
    for area in areas:
        destroy_area(area, INSTALLATION)
        destroy_area(area, INSTALLATION)
    assert list(place.staging.iterdir()) == []
    assert {name: (place.root / name).read_bytes() for name in _LOGS} == _LOGS
    assert (place.root / "var/log/app.log.1").stat().st_nlink == 1


def test_nobody_else_can_look_into_an_area(place: Place) -> None:
    _write(place.root)
    place.keep()
    (area,) = place.areas
    assert Path(area.path).stat().st_mode & 0o7777 == 0o700


@pytest.fixture(params=[case for case in _CASES if case[1] is not Kind.BTRFS], ids=lambda case: "-".join(case))
def staged(request: pytest.FixtureRequest) -> Place:
    filesystem, kind = request.param
    directory: Path = request.getfixturevalue("tmp_path" if filesystem == "plain" else f"{filesystem}_dir")
    place = Place(directory / "zone", directory / "staging", kind)
    place.root.mkdir()
    return place


def _keep(place: Place, **options: Any) -> Kept:
    return keep(place.root, place.staging, place.kind, **options)


def test_the_record_tells_what_the_log_was(staged: Place) -> None:
    _write(staged.root)
    log = staged.root / "var/log/app.log.1"
    log.chmod(0o640)
    os.utime(log, ns=(0, 1_600_000_000_123_456_789))
    status = log.stat()
    kept = _keep(staged)
    found = kept.log("var/log/app.log.1")
    assert (found.source, found.host_root, found.host_path) == ("zone", str(staged.root), b"var/log/app.log.1")
    assert (found.size, found.mode, found.inode) == (40_000, 0o640, status.st_ino)
    assert found.mtime_ns == 1_600_000_000_123_456_789
    assert found.first == 0


def test_journals_are_left_to_journalctl(staged: Place) -> None:
    _write(staged.root, {"app.log": b"", "journal/system.journal": b"x", "journal/user@1.journal~": b"x"})
    kept = _keep(staged)
    assert kept.paths == ["app.log"]
    assert [(step.outcome, step.detail) for step in kept.steps] == [("skip", "not read as logs: 2 × journal file")]


def test_the_newest_logs_come_first(staged: Place) -> None:
    for age, name in enumerate(["b.log", "a.log", "a.log.1", "b.log.1", "a.log.2.gz"]):
        path = staged.root / name
        path.write_bytes(b"x")
        os.utime(path, (time.time() - 1000 * age,) * 2)
    assert _keep(staged).paths == ["b.log", "a.log", "a.log.1", "b.log.1", "a.log.2.gz"]


def test_how_each_kind_stages(staged: Place) -> None:
    _write(staged.root)
    kept = _keep(staged)
    inodes = {}
    for log in kept.logs:
        for part in log.parts:
            inodes[os.fsdecode(log.path)] = os.stat(Path(kept.area.path, part.name)).st_ino == log.inode
    assert inodes["var/log/app.log.1"] == (staged.kind is Kind.HARDLINK)
    assert not inodes["var/log/app.log"], "a current log is never hard linked while its zone lives"


def test_what_is_open_for_writing_is_not_hard_linked(ext4_dir: Path) -> None:
    place = Place(ext4_dir / "zone", ext4_dir / "staging", Kind.HARDLINK)
    _write(place.root, {"app.log": b"1", "app.log.1": b"22", "app.log.2": b"333"})
    with (place.root / "app.log.1").open("ab") as writer, (place.root / "app.log.2").open("rb"):
        kept = _keep(place)
        writer.write(b"more")
    assert kept.contents == {"app.log": b"1", "app.log.1": b"22", "app.log.2": b"333"}
    links = {name: (place.root / name).stat().st_nlink for name in ("app.log", "app.log.1", "app.log.2")}
    assert links == {"app.log": 1, "app.log.1": 1, "app.log.2": 2}


def test_before_a_removal_a_current_log_is_linked_unless_it_is_open(ext4_dir: Path) -> None:
    place = Place(ext4_dir / "zone", ext4_dir / "staging", Kind.HARDLINK)
    _write(place.root, {"app.log": b"1", "open.log": b"22"})
    with (place.root / "open.log").open("ab"):
        kept = _keep(place, living=False, durable=True)
    assert kept.contents == {"app.log": b"1", "open.log": b"22"}
    assert (place.root / "app.log").stat().st_nlink == 2
    assert (place.root / "open.log").stat().st_nlink == 1


def test_no_time_leaves_all_to_be_read_behind(staged: Place, leak_check: None) -> None:
    _write(staged.root)
    kept = _keep(staged, seconds=-1.0)
    assert kept.contents == _LOGS
    assert {part.origin for log in kept.logs for part in log.parts} == {"live"}
    assert kept.gaps == []
    assert [step.outcome for step in kept.steps] == ["timeout"]


def test_older_bytes_than_may_be_copied_are_read_behind(staged: Place) -> None:
    content = os.urandom((5 << 20) + 3)
    _write(staged.root, {"app.log": content})
    kept = _keep(staged, copy_limit=(2 << 20) + 1)
    assert kept.contents == {"app.log": content}
    log = kept.log("app.log")
    if staged.kind is Kind.REFLINK:
        assert [part.origin for part in log.parts] == ["staged"]
    else:
        assert [(part.origin, part.length) for part in log.parts] == [
            ("live", len(content) - (2 << 20) - 1),
            ("staged", (2 << 20) + 1),
        ]


def test_two_names_of_one_file_are_one_log(staged: Place) -> None:
    _write(staged.root, {"app.log.1": b"once"})
    os.link(staged.root / "app.log.1", staged.root / "copy.log")
    assert list(_keep(staged).contents.values()) == [b"once"]


def test_two_stagings_into_one_area_do_not_collide(staged: Place) -> None:
    _write(staged.root)
    kept = _keep(staged, patterns=("var/**",))
    more = _keep(staged, patterns=("opt/**",), area=kept.area)
    assert kept.contents | more.contents == _LOGS
