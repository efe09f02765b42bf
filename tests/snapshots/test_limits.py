"""The limits of a bundle, as far as staging applies them: the newest is kept, the rest is a gap."""

import os
from pathlib import Path

import pytest

from support.staging import keep
from zonebundle.model.record import Limits
from zonebundle.snapshots.base import Kind


@pytest.fixture
def zone(tmp_path: Path) -> Path:
    """Ten logs of 1000 bytes, 0.log the newest."""
    (tmp_path / "zone").mkdir()
    for age in range(10):
        path = tmp_path / "zone" / f"{age}.log"
        path.write_bytes(b"%d" % age * 1000)
        os.utime(path, (1_700_000_000 - age,) * 2)
    return tmp_path / "zone"


def test_the_newest_files_are_kept(zone: Path, tmp_path: Path) -> None:
    kept = keep(zone, tmp_path / "staging", Kind.COPY, limits=Limits(files=3))
    assert kept.paths == ["0.log", "1.log", "2.log"]
    assert [(gap.what, gap.reason) for gap in kept.gaps] == [
        ("7 logs, 6.8 KiB", "beyond the limits of a bundle (3 files, 64.0 GiB); the newest logs are kept")
    ]


def test_the_newest_bytes_are_kept(zone: Path, tmp_path: Path) -> None:
    (zone / "9.log").write_bytes(b"")
    os.utime(zone / "9.log", (1, 1))
    kept = keep(zone, tmp_path / "staging", Kind.COPY, limits=Limits(bundle=4500))
    assert kept.paths == ["0.log", "1.log", "2.log", "3.log"]
    assert [gap.what for gap in kept.gaps] == ["6 logs, 4.9 KiB"]


@pytest.mark.parametrize("kind", ["reflink", "hardlink", "copy"])
def test_of_a_big_log_the_tail_is_kept(xfs_dir: Path, kind: str) -> None:
    zone = xfs_dir / "zone"
    zone.mkdir()
    (zone / "app.log").write_bytes(b"current")
    (zone / "app.log.1").write_bytes(b"0123456789")
    (zone / "app.log.2").write_bytes(b"five5")
    kept = keep(zone, xfs_dir / "staging", Kind(kind), limits=Limits(file=5))
    assert kept.contents == {"app.log": b"rrent", "app.log.1": b"56789", "app.log.2": b"five5"}
    assert (kept.log("app.log.1").size, kept.log("app.log.1").first) == (10, 5)
    assert kept.gaps == []


def test_the_tail_is_kept_of_what_is_read_behind(zone: Path, tmp_path: Path) -> None:
    kept = keep(zone, tmp_path / "staging", Kind.COPY, limits=Limits(file=10), seconds=-1)
    assert kept.contents["3.log"] == b"3" * 10
    assert kept.log("3.log").first == 990


def test_a_big_log_counts_by_what_is_kept_of_it(zone: Path, tmp_path: Path) -> None:
    kept = keep(zone, tmp_path / "staging", Kind.COPY, limits=Limits(file=10, bundle=100))
    assert len(kept.logs) == 10
    assert kept.gaps == []
