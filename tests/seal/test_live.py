"""Ranges that were not staged, read behind from logs that rotate, shrink and vanish meanwhile."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.sealing import Seal
from support.spooled import Draft, SpoolDir, log_lines
from zonebundle.model.record import Part
from zonebundle.seal import live
from zonebundle.seal.sealer import Sealer
from zonebundle.store.pieces import CHUNK

Change = Callable[[Path], object]

SIZE = 3 * CHUNK + 5000
STAGED_FROM = 2 * CHUNK + 100
DATA = log_lines(SIZE)


class Hold:
    """A log in the zone whose tail was staged, as the hold leaves a large current log."""

    def __init__(self, at: SpoolDir, staged_from: int = STAGED_FROM, size: int = SIZE) -> None:
        self.at = at
        self.path = at.zone_root / "logs/app.log"
        self.path.parent.mkdir()
        self.path.write_bytes(DATA[:size])
        self.draft = Draft(at)
        parts = [Part(0, staged_from, "live")] if staged_from else []
        if staged_from < size:
            name = self.draft.stage_bytes(DATA[staged_from:size])
            parts.append(Part(staged_from, size - staged_from, "staged", 0, name, 0))
        status = self.path.stat()
        self.draft.add_file(b"logs/app.log", size, tuple(parts), inode=status.st_ino, mtime_ns=status.st_mtime_ns)

    def log(self) -> bytes:
        return self.at.logs(self.draft)[b"zone/logs/app.log"]

    def gaps(self) -> list[str]:
        gaps = self.at.report(self.draft)["gaps"]
        return [gap["reason"] for gap in gaps if gap["what"] == "logs/zone/logs/app.log"]


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"the zone runs on\n" * 1000)


def rotate(path: Path) -> None:
    path.rename(path.with_name("app.log.1"))
    path.write_bytes(b"a new log\n")


def rotate_twice(path: Path) -> None:
    append(path)
    rotate(path)
    path.with_name("app.log.1").rename(path.with_name("app.log.2"))


@pytest.mark.parametrize("change", [Path.stat, append, rotate, rotate_twice], ids=lambda change: change.__name__)
def test_the_log_itself_is_found_and_read(at: SpoolDir, seal: Seal, change: Change) -> None:
    hold = Hold(at)
    change(hold.path)
    seal(hold.draft)
    assert hold.log() == DATA
    assert hold.gaps() == []


def truncate(path: Path) -> None:
    os.truncate(path, 0)
    append(path)


def truncate_and_refill(path: Path) -> None:
    path.write_bytes(log_lines(SIZE + 9999, seed=5))


def move_away(path: Path) -> None:
    path.rename(path.parents[1] / "archived.log")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def replace_directory_by_link(path: Path) -> None:
    path.parent.rename(path.parents[2] / "elsewhere")
    path.parent.symlink_to(path.parents[2] / "elsewhere")


LOST = {
    truncate: "was truncated after the hold",
    truncate_and_refill: "was truncated and written again after the hold",
    move_away: "was removed, or moved to another directory, after the hold",
    Path.unlink: "was removed, or moved to another directory, after the hold",
    replace_by_fifo: "was removed, or moved to another directory, after the hold",
    replace_by_link: "",
    replace_directory_by_link: "",
}


@pytest.mark.parametrize("change", LOST, ids=lambda change: change.__name__)
def test_what_is_not_the_same_log_is_zeros_and_a_gap(at: SpoolDir, seal: Seal, change: Change) -> None:
    hold = Hold(at)
    change(hold.path)
    seal(hold.draft)
    assert hold.log() == bytes(STAGED_FROM) + DATA[STAGED_FROM:]
    (reason,) = hold.gaps()
    assert reason.endswith(f": {STAGED_FROM} bytes are zeros")
    assert LOST[change] in reason


def test_a_log_that_was_not_staged_at_all(at: SpoolDir, seal: Seal) -> None:
    hold = Hold(at, staged_from=SIZE)
    rotate(hold.path)
    seal(hold.draft)
    assert (hold.log(), hold.gaps()) == (DATA, [])


def test_a_small_log_that_was_not_staged_at_all(at: SpoolDir, seal: Seal) -> None:
    hold = Hold(at, staged_from=700, size=700)
    append(hold.path)
    seal(hold.draft)
    assert (hold.log(), hold.gaps()) == (DATA[:700], [])


def test_a_log_rewritten_in_place_is_told(at: SpoolDir, seal: Seal) -> None:
    hold = Hold(at, staged_from=700, size=700)
    hold.path.write_bytes(b"?" * 700)
    os.utime(hold.path, ns=(1, 1))
    seal(hold.draft)
    assert hold.gaps() == ["was written to after the hold, without growing; the bytes are as they were found"]


def test_a_log_truncated_while_it_is_read_is_told(
    at: SpoolDir, sealer: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = Hold(at)
    original = live.LiveLog.check

    def check(self: live.LiveLog) -> str:
        # All has been read by now; the check after it must not trust it.
        truncate_and_refill(hold.path)
        return original(self)

    monkeypatch.setattr(live.LiveLog, "check", check)
    hold.draft.write()
    assert sealer.seal(hold.draft.bundle_id, lambda total, done: None, threading.Event()) is not None
    assert hold.log() == DATA
    assert hold.gaps() == [
        "was truncated and written again after the hold while it was read; the bytes are as they were found"
    ]


def test_a_zone_root_that_is_gone_is_a_gap(at: SpoolDir, seal: Seal) -> None:
    hold = Hold(at)
    at.zone_root.rename(at.base / "removed")
    seal(hold.draft)
    assert hold.log() == bytes(STAGED_FROM) + DATA[STAGED_FROM:]
    (reason,) = hold.gaps()
    assert reason == f"cannot be opened: No such file or directory: {STAGED_FROM} bytes are zeros"


def test_a_large_range_that_is_lost_costs_nothing(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    size = 1 << 40
    tail = log_lines(5000)
    name = draft.stage_bytes(tail)
    draft.limits = draft.limits.__class__(bundle=1 << 50)
    draft.add_file(
        b"app.log",
        size,
        (Part(0, size - 5000, "live"), Part(size - 5000, 5000, "staged", 0, name, 0)),
    )
    sealed = seal(draft)
    assert sealed.header.gaps == 2
    assert sealed.seconds < 30


def test_absolute_host_paths_are_taken_below_their_root(at: SpoolDir, seal: Seal) -> None:
    path = at.zone_root / "app.log"
    path.write_bytes(b"content")
    draft = Draft(at)
    status = path.stat()
    draft.add_file(
        b"app.log",
        7,
        (Part(0, 7, "live"),),
        inode=status.st_ino,
        mtime_ns=status.st_mtime_ns,
        host_path=os.fsencode(path),
    )
    seal(draft)
    assert at.logs(draft) == {b"zone/app.log": b"content"}
