"""Rotated logs of zones that run are sealed before any bundle needs them, but never what somebody may still change."""

import os
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from support.ahead import Compressed, Host, fill
from support.spooled import log_lines
from zonebundle.model.zone import LogTree, ProcessRef
from zonebundle.seal import ahead
from zonebundle.store.pieces import CHUNK

IS_ROOT = os.geteuid() == 0


def test_a_bundle_compresses_only_what_is_new(host: Host, compressed: Compressed) -> None:
    logs = host.add()
    rotated = fill(logs)
    told = host.run()
    assert (told["files"], told["bytes"], told["freed"]) == (4, rotated, 0)
    assert compressed.bytes == rotated
    assert list(host.at.store.glob("bundles/*/*")) == []
    before = host.segments
    # The two small ones are in a pack, as are the three chunks of the largest.
    assert len(before) == 3
    compressed.bytes = 0
    host.bundle()
    assert compressed.bytes == 5000
    assert before < host.segments
    assert len(host.segments) == 4


def test_nothing_is_done_twice(host: Host, compressed: Compressed) -> None:
    fill(host.add())
    host.run()
    compressed.bytes = 0
    assert host.run() == {"files": 0, "bytes": 0, "known": 0, "freed": 0}
    host.restart()
    # Found by their identity, and claimed again.
    assert host.run() == {"files": 0, "bytes": 0, "known": 4, "freed": 0}
    assert compressed.bytes == 0


def test_all_is_looked_at_again_now_and_then(host: Host) -> None:
    logs = host.add()
    fill(logs)
    host.run()
    # No trace in the directory.
    (logs / "app.log.1").write_bytes(b"another")
    seen = [host.run()["files"] for _ in range(2 * ahead._RUNS_TO_LOOK_AGAIN)]
    assert sum(seen) == 1
    assert host.known(logs / "app.log.1")


def test_a_rotation_is_followed(host: Host, compressed: Compressed) -> None:
    logs = host.add()
    fill(logs)
    host.run()
    before = host.segments
    for number in (4, 3, 2, 1):
        (logs / f"app.log.{number}").rename(logs / f"app.log.{number + 1}")
    (logs / "app.log").rename(logs / "app.log.1")
    (logs / "app.log").write_bytes(b"new")
    compressed.bytes = 0
    host.run()
    assert compressed.bytes == 5000
    assert before < host.segments
    assert len(host.segments) == len(before) + 1
    compressed.bytes = 0
    host.bundle()
    assert compressed.bytes == 3


def test_the_current_log_of_each_family_is_left_alone(host: Host) -> None:
    logs = host.add()
    for name in ("a.log", "b-2026-01-01.log", "b-2026-01-02.log", "c.log.1", "x.journal", "y@1.journal~"):
        (logs / name).write_bytes(b"log " + name.encode())
    (logs / "a.log.2.gz").write_bytes(b"\x1f\x8b\x08 not really")
    (logs / "a.log.3").touch()
    host.run()
    taken = {path.name for path in logs.iterdir() if host.known(path)}
    assert taken == {"b-2026-01-01.log", "a.log.2.gz"}


def test_a_log_that_is_open_for_writing_is_left_until_it_is_closed(host: Host) -> None:
    logs = host.add()
    (logs / "app.log").touch()
    with (logs / "app.log.1").open("wb") as writer:
        writer.write(b"lines")
        writer.flush()
        assert host.run()["files"] == 0
        assert host.run()["files"] == 0
    # The directory has not changed.
    assert host.run()["files"] == 1


def test_a_log_whose_stamps_are_young_is_left_for_the_next_run(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = host.add()
    fill(logs)
    host.settle()
    monkeypatch.setattr("zonebundle.model.identity.TRUSTED_AGE_NS", 1 << 62)
    assert host.run()["files"] == 0
    monkeypatch.undo()
    assert host.run()["files"] == 4


@pytest.mark.parametrize("size", [1000, 3 * CHUNK], ids=["small", "large"])
@pytest.mark.parametrize("how", ["append", "truncate", "overwrite", "replace", "remove"])
def test_a_log_that_changes_while_it_is_read_is_not_noted(
    host: Host, monkeypatch: pytest.MonkeyPatch, size: int, how: str
) -> None:
    logs = host.add()
    # The first run would sweep the store.
    host.run()
    (logs / "app.log").write_bytes(b"current")
    path = logs / "app.log.1"
    path.write_bytes(log_lines(size, 1))
    host.settle()
    pread = os.pread
    changes: list[str] = []

    def change() -> None:
        if how == "append":
            with path.open("ab") as file:
                file.write(b"more")
        elif how == "truncate":
            os.truncate(path, 10)
        elif how == "overwrite":
            with path.open("r+b") as file:
                file.write(b"other")
        elif how == "replace":
            (logs / "new").write_bytes(log_lines(size, 2))
            (logs / "new").rename(path)
        else:
            path.unlink()

    def pread_and_change(descriptor: int, length: int, offset: int) -> bytes:
        data = pread(descriptor, length, offset)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
            monkeypatch.setattr(os, "pread", pread)
            change()
            changes.append(how)
        return data

    monkeypatch.setattr(os, "pread", pread_and_change)
    told = host.run(settle=False)
    assert changes == [how]
    assert told["files"] == 0
    assert host.segments == set()
    monkeypatch.undo()
    host.bundle()
    if path.exists():
        host.run()
        assert host.known(path)
    host.bundle()


def test_a_change_that_keeps_size_and_mtime_is_seen(host: Host) -> None:
    logs = host.add()
    fill(logs)
    host.run()
    stamp = (logs / "app.log.1").stat()
    (logs / "app.log.1").write_bytes(b"x" * stamp.st_size)
    os.utime(logs / "app.log.1", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (logs / "app.log.5").write_bytes(b"so that the directory is looked at")
    before = host.segments
    assert host.run()["files"] == 2
    assert host.known(logs / "app.log.1")
    # What app.log.1 was is in a pack with app.log.2; both new ones are in another.
    assert len(host.segments) == len(before) + 1
    (logs / "app.log.3").write_bytes(b"shorter")
    (logs / "app.log.6").write_bytes(b"so that the directory is looked at")
    host.run()
    # The old one's segment is gone.
    assert len(host.segments) == len(before) + 1
    host.bundle()


def lay_traps(logs: Path, outside: Path) -> None:
    outside.mkdir()
    (outside / "secret.log.1").write_bytes(b"the host's secret")
    (outside / "secret.log").touch()
    (logs / "link.log.1").symlink_to(outside / "secret.log.1")
    (logs / "away").symlink_to(outside)
    (logs / "loop").symlink_to(logs)
    os.mkfifo(logs / "fifo.log.1")
    with (logs / "sparse.log.1").open("wb") as sparse:
        sparse.truncate(1 << 40)
        sparse.seek((1 << 40) - 4)
        sparse.write(b"end\n")
    for name in (b"new\nline.log.1", b"not-utf8-\xff\xfe.log.1", b"-rf.log.1"):
        Path(os.fsdecode(os.path.join(os.fsencode(logs), name))).write_bytes(b"named " + name)
    for current in ("link", "fifo", "sparse", "new\nline", "-rf", "device", "hard"):
        (logs / f"{current}.log").touch()
    Path(os.fsdecode(os.fsencode(logs) + b"/not-utf8-\xff\xfe.log")).touch()
    if IS_ROOT:
        os.mknod(logs / "device.log.1", 0o600 | 0o020000, os.makedev(1, 5))
        os.link(outside / "secret.log.1", logs / "hard.log.1")
        os.chown(logs, 12345, 12345)
    else:
        (logs / "unreadable.log.1").write_bytes(b"x")
        (logs / "unreadable.log.1").chmod(0)
        (logs / "unreadable.log").touch()


def test_traps_are_passed_over(host: Host, tmp_path: Path) -> None:
    logs = host.add()
    lay_traps(logs, tmp_path / "outside")
    told = host.run()
    # Three with odd names, and the terabyte of hole.
    assert told["files"] == 4
    assert host.known(logs / "sparse.log.1")
    raw = b"".join(
        subprocess.run(["zcat", path], check=True, capture_output=True).stdout
        for path in host.at.store.glob("segments/??/*.gz")
    )
    assert b"secret" not in raw
    assert raw.count(b"named ") == 3
    assert raw.count(b"\0") == 2 * CHUNK - 4
    assert host.run()["files"] == 0


def test_a_tree_whose_files_are_swapped_all_the_time(host: Host, tmp_path: Path) -> None:
    logs = host.add()
    outside = tmp_path / "outside"
    for directory, data in ((outside, b"secret"), (logs / "swap", b"the zone's")):
        directory.mkdir()
        (directory / "a.log").touch()
        (directory / "a.log.1").write_bytes(data)
    (logs / "swapped").symlink_to(outside)
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for old, new in (("swap", "aside"), ("swapped", "swap"), ("swap", "swapped"), ("aside", "swap")):
                (logs / old).rename(logs / new)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(50):
            host.run(settle=False)
    finally:
        done.set()
        thread.join()
    host.run()
    assert len(host.segments) == 1
    assert host.known(logs / "swap/a.log.1")


def test_a_large_file_is_left_to_the_seals(host: Host) -> None:
    logs = host.add()
    fill(logs)
    host.settle()
    zones = [{"name": "web", "is_running": True, "trees": [asdict(host.tree("web"))]}]
    assert host.upkeep.ahead(zones, True, 2 * CHUNK)["files"] == 3


def test_trees_in_other_mount_namespaces_are_left_out(host: Host) -> None:
    logs = host.add()
    fill(logs)
    tree = LogTree("zone", str(logs), ("**",), via=ProcessRef(1, 0))
    assert host.run(trees=[tree])["files"] == 0
