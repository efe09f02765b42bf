"""Zones that lie: what is not a log of theirs is never read, nothing hangs, and the rest is kept."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.staging import keep
from zonebundle.snapshots.base import Kind

_root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
_SECRET = b"the host's secret\n"


@pytest.fixture(params=["reflink-xfs", "hardlink-ext4", "copy-plain"])
def place(request: pytest.FixtureRequest) -> tuple[Path, Kind]:
    kind, _, filesystem = request.param.partition("-")
    directory: Path = request.getfixturevalue("tmp_path" if filesystem == "plain" else f"{filesystem}_dir")
    (directory / "zone" / "log").mkdir(parents=True)
    (directory / "host").mkdir()
    (directory / "host" / "secret").write_bytes(_SECRET)
    return directory, Kind(kind)


def test_links_are_not_followed(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    log = directory / "zone" / "log"
    (log / "app.log").write_bytes(b"mine")
    (log / "final").symlink_to("../../host/secret")
    (log / "absolute").symlink_to(directory / "host" / "secret")
    (log / "directory").symlink_to("../../host")
    (log / "inside").symlink_to("app.log")
    (log / "dangling").symlink_to("nowhere")
    kept = keep(directory / "zone", directory / "staging", kind)
    assert kept.contents == {"log/app.log": b"mine"}
    assert [step.detail for step in kept.steps] == ["not read as logs: 5 × symbolic link"]
    assert kept.gaps == []


def test_a_link_on_the_way_is_a_gap(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    (directory / "zone" / "var").symlink_to("../host")
    (directory / "zone" / "opt").symlink_to(directory)
    kept = keep(directory / "zone", directory / "staging", kind, patterns=("var/secret", "log/**", "opt/host/secret"))
    assert kept.logs == []
    assert {gap.what for gap in kept.gaps} == {"logs/zone/var", "logs/zone/opt/host"}
    assert all("symbolic link" in gap.reason for gap in kept.gaps)


def test_what_is_no_file_is_not_opened(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    log = directory / "zone" / "log"
    os.mkfifo(log / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        with contextlib.chdir(log):
            listener.bind("socket")
        if os.geteuid() == 0:
            os.mknod(log / "tty", 0o600 | 0o020000, os.makedev(5, 0))
        kept = keep(directory / "zone", directory / "staging", kind)
    assert kept.logs == []
    assert kept.gaps == []
    (step,) = kept.steps
    device = "1 × character device, " if os.geteuid() == 0 else ""
    assert step.detail == f"not read as logs: 1 × FIFO, {device}1 × socket"


@contextlib.contextmanager
def _beside(work: Callable[[], None]) -> Iterator[None]:
    """Do `work` over and over in another process: in a thread it would only run where the staging lets it."""
    child = os.fork()
    if child == 0:
        try:
            while os.getppid() != 1:
                work()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.slow
def test_swapping_while_it_looks_leads_nowhere(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    zone = directory / "zone"
    for name in ("log", "other", "spare"):
        (zone / name).mkdir(exist_ok=True)
        (zone / name / "secret").write_bytes(b"mine")
    os.mkfifo(zone / "fifo")
    shutil.copy(zone / "log/secret", zone / "file")
    (zone / "link").symlink_to("../host")
    (zone / "final").symlink_to(directory / "host/secret")

    def swap() -> None:
        for link in ("link", "final", "fifo"):
            # A directory and a file that are now what they seem and now a way out.
            _exchange(zone / "log", zone / link)
            _exchange(zone / "file", zone / link)

    read = set()
    with _beside(swap):
        for _ in range(150):
            kept = keep(zone, directory / "staging", kind)
            for log in kept.logs:
                if all(part.origin == "staged" for part in log.parts):
                    read.add(kept.content(log))
            kept.destroy()
    assert read == {b"mine"}


def _exchange(first: Path, second: Path) -> None:
    spare = first.parent / "swap"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def test_a_sparse_terabyte_is_not_read(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    sparse = directory / "zone" / "log" / "sparse.log"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
        file.seek((1 << 40) - 5)
        file.write(b"tail\n")
    began = time.monotonic()
    kept = keep(directory / "zone", directory / "staging", kind)
    assert time.monotonic() - began < 5
    log = kept.log("log/sparse.log")
    assert log.size == 1 << 40
    assert log.size - log.first == 32 << 30
    newest = log.parts[-1]
    assert newest.origin == "staged"
    with Path(kept.area.path, newest.name).open("rb") as file:
        file.seek(newest.offset + newest.length - 10)
        assert file.read(10) == b"\0" * 5 + b"tail\n"
        assert os.fstat(file.fileno()).st_blocks * 512 <= 1 << 20, "holes stay holes"


def test_a_sparse_log_of_which_holes_are_copied_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "zone" / "sparse.log"
    log.parent.mkdir()
    with log.open("wb") as file:
        for megabyte in (0, 3, 9):
            file.seek(megabyte << 20)
            file.write(os.urandom(1000))
        file.truncate(12 << 20)
    kept = keep(log.parent, tmp_path / "staging", Kind.COPY)
    assert kept.contents == {"sparse.log": log.read_bytes()}


@_root_only
def test_a_hard_link_to_anothers_file_is_a_gap(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    log = directory / "zone" / "log"
    os.chown(log, 1000, 1000)
    (log / "app.log.1").write_bytes(b"mine")
    os.chown(log / "app.log.1", 1000, 1000)
    (log / "roots.log").write_bytes(b"opened by root, as nginx does")
    os.link(directory / "host" / "secret", log / "planted")
    os.link(log / "app.log.1", log / "again.log.1")
    kept = keep(directory / "zone", directory / "staging", kind)
    assert sorted(kept.contents.values()) == [b"mine", b"opened by root, as nginx does"]
    (gap,) = kept.gaps
    assert gap.what == "logs/zone/log/planted"
    assert "hard link" in gap.reason


@_root_only
def test_our_own_links_do_not_make_a_log_suspicious(ext4_dir: Path) -> None:
    log = ext4_dir / "zone" / "log"
    log.mkdir(parents=True)
    os.chown(log, 1000, 1000)
    (log / "app.log").write_bytes(b"")
    (log / "app.log.1").write_bytes(b"root's, in a directory of another")
    first = keep(ext4_dir / "zone", ext4_dir / "staging", Kind.HARDLINK)
    assert (log / "app.log.1").stat().st_nlink == 2
    second = keep(ext4_dir / "zone", ext4_dir / "staging", Kind.HARDLINK)
    assert second.contents == first.contents
    assert second.gaps == []
    os.link(log / "app.log.1", ext4_dir / "elsewhere")
    assert len(keep(ext4_dir / "zone", ext4_dir / "staging", Kind.HARDLINK).gaps) == 1


def test_names_of_any_bytes(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    names = [b"new\nline.log", b"\xff\xfe.log", b"-rf", b"esc\x1b[31m.log", b"<b>.log", b"; rm", b" ", b"x" * 255]
    for name in names:
        with open(os.fsencode(directory / "zone" / "log") + b"/" + name, "wb") as file:
            file.write(b"in " + name)
    kept = keep(directory / "zone", directory / "staging", kind)
    assert {log.path: kept.content(log) for log in kept.logs} == {b"log/" + name: b"in " + name for name in names}
    assert kept.log(b"log/\xff\xfe.log").to_json()["path_bytes"]


def test_names_in_gaps_are_printable(tmp_path: Path) -> None:
    (tmp_path / "zone").mkdir()
    (tmp_path / "zone" / "a\nb\x1b").symlink_to("/etc")
    kept = keep(tmp_path / "zone", tmp_path / "staging", Kind.COPY, patterns=("a\nb\x1b/*.conf",))
    assert [gap.what for gap in kept.gaps] == ["logs/zone/a\\x0ab\\x1b"]


def test_directories_beyond_any_depth_are_a_gap(tmp_path: Path, leak_check: None) -> None:
    deep = tmp_path / "zone"
    deep.joinpath(*"d" * 70).mkdir(parents=True)
    deep.joinpath(*"d" * 64, "near.log").write_bytes(b"near")
    deep.joinpath(*"d" * 66, "far.log").write_bytes(b"far")
    kept = keep(tmp_path / "zone", tmp_path / "staging", Kind.COPY)
    assert list(kept.contents.values()) == [b"near"]
    (gap,) = kept.gaps
    assert "deeper than 64" in gap.reason


@pytest.mark.slow
def test_twenty_thousand_files_and_no_time(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    log = directory / "zone" / "log"
    for number in range(20_000):
        os.close(os.open(f"{log}/{number}.log", os.O_WRONLY | os.O_CREAT))
        if number % 100 == 0:
            (log / f"{number}.log").write_bytes(b"%d" % number)
    began = time.monotonic()
    kept = keep(directory / "zone", directory / "staging", kind, seconds=0.005)
    assert time.monotonic() - began < 5
    assert len(kept.logs) == 20_000 or kept.gaps, "nothing is missing in silence"
    contents = kept.contents
    assert all(contents.get(f"log/{number}.log", b"%d" % number) == b"%d" % number for number in range(0, 20_000, 100))


@pytest.mark.slow
def test_a_directory_full_of_comings_and_goings_ends(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    log = directory / "zone" / "log"
    (log / "app.log").write_bytes(b"steady")

    def churn() -> None:
        for number in range(50):
            (log / f"temporary{number}").write_bytes(b"x")
        for number in range(50):
            (log / f"temporary{number}").unlink()

    with _beside(churn):
        for _ in range(20):
            kept = keep(directory / "zone", directory / "staging", kind)
            assert kept.content(kept.log("log/app.log")) == b"steady"
            kept.destroy()


@_root_only
def test_mounts_are_not_entered(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    log = directory / "zone" / "log"
    (log / "app.log").write_bytes(b"mine")
    (log / "file.log").write_bytes(b"covered")
    (log / "mounted").mkdir()
    for source, target in ((directory / "host", log / "mounted"), (directory / "host/secret", log / "file.log")):
        subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        kept = keep(directory / "zone", directory / "staging", kind)
    finally:
        for target in (log / "mounted", log / "file.log"):
            subprocess.run(["umount", target], check=True)
    assert kept.contents == {"log/app.log": b"mine"}
    assert [gap.what for gap in kept.gaps] == ["logs/zone/log/file.log"]
    assert [step.detail for step in kept.steps] == ["not read as logs: 1 × mount"]


def test_a_thread_that_swaps_descriptors_finds_none_left(place: tuple[Path, Kind], leak_check: None) -> None:
    directory, kind = place
    for number in range(50):
        (directory / "zone" / "log" / f"{number}.log").write_bytes(b"x" * number)
    threads = [threading.Thread(target=keep, args=(directory / "zone", directory / "staging", kind)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
