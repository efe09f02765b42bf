"""How one log is brought into an area."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import filesystems
from support.staging import keep, new_area
from support.users import OrdinaryUser
from zonebundle.snapshots import place
from zonebundle.snapshots.base import Kind
from zonebundle.snapshots.place import AreaFiles, is_unwritten

_WRITER = """
import os, sys
while True:
    for flags in (os.O_WRONLY, os.O_RDONLY, os.O_RDWR):
        try:
            os.close(os.open(sys.argv[1], flags | os.O_NONBLOCK))
        except BlockingIOError:
            pass
"""


def test_a_file_is_unwritten_unless_somebody_has_it_open_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert is_unwritten(descriptor)
        with path.open("rb"):
            assert is_unwritten(descriptor)
        with path.open("ab"):
            assert not is_unwritten(descriptor)
        assert is_unwritten(descriptor)
        assert fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    finally:
        os.close(descriptor)


def test_who_opens_a_file_in_that_moment_does_no_harm(tmp_path: Path, leak_check: None) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x")
    # The kernel signals the holder of a lease that is to be broken, and SIGIO would end this process.
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)]) as writer:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            answers: set[bool] = set()
            deadline = time.monotonic() + 20
            count = 0
            while (count < 5000 or len(answers) < 2) and time.monotonic() < deadline:
                answers.add(is_unwritten(descriptor))
                count += 1
            os.close(descriptor)
        finally:
            writer.kill()
    assert answers == {True, False}


def _files(area: Path, **options: object) -> AreaFiles:
    given: dict[str, object] = {"copy_limit": 1 << 30, "file_limit": 1 << 40, "is_late": lambda: False}
    return AreaFiles(area, 7, **(given | options))  # type: ignore[arg-type]


@pytest.fixture
def area(tmp_path: Path) -> Path:
    return Path(new_area(tmp_path / "staging").path)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "app.log"
    path.write_bytes(os.urandom((4 << 20) + 100))
    yield path


def _copy(files: AreaFiles, log: Path) -> place.Placed:
    descriptor = os.open(log, os.O_RDONLY)
    try:
        return files.copy(descriptor, os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _bytes(area: Path, placed: place.Placed) -> bytes:
    (part,) = placed.parts
    assert (part.origin, part.area, part.start) == ("staged", 7, 0)
    with (area / part.name).open("rb") as file:
        file.seek(part.offset)
        return file.read(part.length)


def _disturb(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], None]) -> list[int]:
    """Do `work` with the number of each range that is copied, after it."""
    copied: list[int] = []
    original = place._copy_range

    def copy_range(source: int, target: int, start: int, at: int, view: memoryview) -> bool:
        done = original(source, target, start, at, view)
        copied.append(start)
        work(len(copied))
        return done

    monkeypatch.setattr(place, "_copy_range", copy_range)
    return copied


def test_a_log_that_grows_while_it_is_copied_is_what_it_was(
    area: Path, log: Path, monkeypatch: pytest.MonkeyPatch, leak_check: None
) -> None:
    before = log.read_bytes()

    def grow(_: int) -> None:
        with log.open("ab") as file:
            file.write(b"more")

    copied = _disturb(monkeypatch, grow)
    files = _files(area)
    placed = _copy(files, log)
    files.close()
    assert _bytes(area, placed) == before
    assert copied == sorted(copied, reverse=True), "the newest bytes first"
    assert len(copied) == 5


@pytest.mark.parametrize("regrown", [0, 1000, 1 << 20, 6 << 20])
def test_a_log_truncated_while_it_is_copied_is_copied_again(
    area: Path, log: Path, monkeypatch: pytest.MonkeyPatch, regrown: int
) -> None:
    after = os.urandom(regrown)

    def truncate(count: int) -> None:
        if count == 3:
            # As with copytruncate: the same inode, and the writer goes on with O_APPEND.
            with log.open("r+b") as file:
                file.truncate(0)
                file.write(after)

    _disturb(monkeypatch, truncate)
    files = _files(area)
    placed = _copy(files, log)
    files.close()
    assert placed.size == regrown
    assert not regrown or _bytes(area, placed) == after


def test_a_log_truncated_under_a_writer_that_does_not_append_is_copied_again(
    area: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = log.stat().st_size

    def truncate(count: int) -> None:
        if count == 3:
            # It goes on at its old offset: the log is as long as ever, with a hole before.
            with log.open("r+b") as file:
                file.truncate(0)
                file.seek(size)
                file.write(b"next")

    _disturb(monkeypatch, truncate)
    files = _files(area)
    placed = _copy(files, log)
    files.close()
    assert _bytes(area, placed) == log.read_bytes()


def test_a_log_rewritten_all_the_time_is_given_up_with_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak_check: None
) -> None:
    log = tmp_path / "zone" / "app.log"
    log.parent.mkdir()

    def rewrite(count: int) -> None:
        log.write_bytes(os.urandom(1000))

    rewrite(0)
    _disturb(monkeypatch, rewrite)
    kept = keep(log.parent, tmp_path / "staging", Kind.COPY)
    (gap,) = kept.gaps
    assert gap.what == "logs/zone/app.log"
    assert "each of the 5 times" in gap.reason
    assert kept.contents == {"app.log": log.read_bytes()}, "it is read behind"


def test_time_that_runs_out_leaves_older_bytes_to_be_read_behind(area: Path, log: Path, leak_check: None) -> None:
    looks = iter([False, True])
    files = _files(area, is_late=lambda: next(looks))
    placed = _copy(files, log)
    files.close()
    live, staged = placed.parts
    assert (live.start, live.length, live.origin) == (0, (2 << 20) + 100, "live")
    assert (staged.start, staged.length) == ((2 << 20) + 100, 2 << 20)
    with (area / staged.name).open("rb") as file:
        file.seek(staged.offset)
        assert file.read(staged.length) == log.read_bytes()[-(2 << 20) :]


def test_what_was_cut_off_by_the_limit_is_not_there(area: Path, log: Path) -> None:
    files = _files(area, copy_limit=1000, file_limit=3000)
    placed = _copy(files, log)
    files.close()
    size = log.stat().st_size
    assert [(part.start, part.length, part.origin) for part in placed.parts] == [
        (size - 3000, 2000, "live"),
        (size - 1000, 1000, "staged"),
    ]


def test_a_full_staging_directory_leaves_logs_in_their_place(tmp_path: Path, tmpfs_dir: Path, leak_check: None) -> None:
    logs = {f"{name}.log": os.urandom(200_000) for name in "abc"}
    (tmp_path / "zone").mkdir()
    for name, content in logs.items():
        (tmp_path / "zone" / name).write_bytes(content)
    area = new_area(tmpfs_dir / "staging")
    with (tmpfs_dir / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, filesystems.TMPFS_BYTES - (300 << 10))
    kept = keep(tmp_path / "zone", tmpfs_dir / "staging", Kind.COPY, area=area)
    assert kept.contents == logs
    assert kept.gaps == []
    assert {part.origin for log in kept.logs for part in log.parts} == {"live", "staged"}


def test_a_missing_area_leaves_logs_in_their_place(tmp_path: Path, leak_check: None) -> None:
    (tmp_path / "zone").mkdir()
    (tmp_path / "zone" / "app.log").write_bytes(b"x")
    area = new_area(tmp_path / "staging")
    Path(area.path, "owner.json").unlink()
    Path(area.path).rmdir()
    kept = keep(tmp_path / "zone", tmp_path / "staging", Kind.COPY, area=area)
    assert kept.contents == {"app.log": b"x"}
    assert [step.outcome for step in kept.steps] == ["fail", "timeout"]


def test_links_across_file_systems_become_copies(ext4_dir: Path, xfs_dir: Path, leak_check: None) -> None:
    logs = {"app.log": b"1", "app.log.1": b"22", "app.log.2": b"333"}
    (ext4_dir / "zone").mkdir()
    for name, content in logs.items():
        (ext4_dir / "zone" / name).write_bytes(content)
    for kind in (Kind.HARDLINK, Kind.REFLINK):
        kept = keep(ext4_dir / "zone", xfs_dir / "staging", kind)
        assert kept.contents == logs
        assert kept.gaps == []
        assert {part.origin for log in kept.logs for part in log.parts} == {"staged"}
        assert [step.outcome for step in kept.steps] == ["fail"] * (1 if kind is Kind.HARDLINK else 2)


def test_reflinks_where_there_are_none_become_hard_links(ext4_dir: Path) -> None:
    (ext4_dir / "zone").mkdir()
    for name in ("app.log", "app.log.1"):
        (ext4_dir / "zone" / name).write_bytes(b"x")
    kept = keep(ext4_dir / "zone", ext4_dir / "staging", Kind.REFLINK)
    assert (ext4_dir / "zone" / "app.log.1").stat().st_nlink == 2
    assert [step.detail for step in kept.steps] == [
        "reflink does not work here (Operation not supported), hardlink is tried"
    ]


def test_a_file_that_cannot_be_cloned_is_staged_otherwise(btrfs_dir: Path) -> None:
    zone = btrfs_dir / "zone"
    zone.mkdir()
    for name in ("app.log", "nocow.log"):
        (zone / name).touch()
    subprocess.run(["chattr", "+C", zone / "nocow.log"], check=True)
    for name in ("app.log", "nocow.log"):
        (zone / name).write_bytes(name.encode())
    kept = keep(zone, btrfs_dir / "staging", Kind.REFLINK)
    assert kept.contents == {"app.log": b"app.log", "nocow.log": b"nocow.log"}
    assert {part.origin for log in kept.logs for part in log.parts} == {"staged"}
    assert kept.steps == []


def test_bind_mounts_hinder_links_but_not_reflinks(xfs_dir: Path, ext4_dir: Path, leak_check: None) -> None:
    for directory, kind, links in ((xfs_dir, Kind.REFLINK, True), (ext4_dir, Kind.HARDLINK, False)):
        (directory / "origin").mkdir()
        (directory / "zone").mkdir()
        for name in ("app.log", "app.log.1"):
            (directory / "origin" / name).write_bytes(b"x" * 5000)
        subprocess.run(["mount", "--bind", directory / "origin", directory / "zone"], check=True)
        try:
            kept = keep(directory / "zone", directory / "staging", kind)
        finally:
            subprocess.run(["umount", directory / "zone"], check=True)
        assert {log.size for log in kept.logs} == {5000}
        assert {part.origin for log in kept.logs for part in log.parts} == {"staged"}
        assert (kept.steps == []) == links


def test_an_ordinary_user_links_his_own_logs_and_copies_others(
    ordinary_user: OrdinaryUser, as_user: Callable[[OrdinaryUser, Callable[[], str]], str]
) -> None:
    zone = ordinary_user.home / "zone"
    zone.mkdir()
    for name in ("app.log", "app.log.1", "other.log", "other.log.1", "closed.log"):
        (zone / name).write_bytes(name.encode())
        if name.startswith("app"):
            os.chown(zone / name, ordinary_user.uid, ordinary_user.gid)
    (zone / "closed.log").chmod(0o600)

    def stage() -> str:
        kept = keep(zone, ordinary_user.home / "staging", Kind.HARDLINK)
        return repr((sorted(kept.contents.items()), sorted((gap.what, gap.reason) for gap in kept.gaps)))

    os.chmod(ordinary_user.home, 0o700)
    contents, gaps = eval(as_user(ordinary_user, stage))
    names = ["app.log", "app.log.1", "other.log", "other.log.1"]
    if os.geteuid() == 0:
        assert contents == [(name, name.encode()) for name in names]
        assert gaps == [("logs/zone/closed.log", f"cannot be opened: {os.strerror(errno.EACCES)}")]
        assert (zone / "other.log.1").stat().st_nlink == 1
    assert (zone / "app.log.1").stat().st_nlink == 2
