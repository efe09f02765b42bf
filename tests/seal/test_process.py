"""The real sealer process: killed, stopped, starved of space, and run beside itself."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import leaks, wait
from support.sealers import SealerProcess
from support.spooled import INSTALLATION, Draft, SpoolDir, log_lines
from support.stored import check_clean, check_whole
from zonebundle.host import trace
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area, Part, SnapshotTree
from zonebundle.snapshots.areas import prepare_area
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import prepare

SEAL_POINTS = [name for name in trace.POINTS if name.startswith("seal.")]
# Points that are passed more than once, also at a later passage.
LATER = ["seal.reading:3", "seal.segment-written:4", "seal.reading:9"]


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with leaks.no_leaks():
        yield


# Does not take a log for poison that was on its way at three of our kills.
PATIENT = "from zonebundle.seal import marks\nmarks.CRASHES_TO_SKIP = 1000"


def full_draft(at: SpoolDir) -> Draft:
    """A draft with everything that a record may have."""
    draft = Draft(at)
    snapshot = at.staging / snapshot_name(INSTALLATION, draft.bundle_id)
    draft.add_output("ptree", b"1 init\n")
    draft.area()
    (snapshot / "snapshot/logs").mkdir(parents=True)
    for number in range(5):
        data = log_lines(number * 30_000, 100 + number)
        (snapshot / f"snapshot/logs/{number}.snap").write_bytes(data)
        draft.expected[b"zone/logs/%d.snap" % number] = data
    draft.add_tree(SnapshotTree(0, "logs", "zone", "logs", ("logs/**",), str(at.zone_root)))
    draft.add_log(b"big.log", log_lines(6 * CHUNK + 123))
    for number in range(50):
        draft.add_log(b"small/%d.log" % number, log_lines(number * 100, number))
    live = at.zone_root / "live.log"
    data = log_lines(CHUNK + 7, 77)
    live.write_bytes(data)
    status = live.stat()
    name = draft.stage_bytes(data[-100:])
    cut = len(data) - 100
    draft.add_file(
        b"live.log",
        len(data),
        (Part(0, cut, "live"), Part(cut, 100, "staged", 0, name, 0)),
        inode=status.st_ino,
        mtime_ns=status.st_mtime_ns,
    )
    draft.expected[b"zone/live.log"] = data
    return draft


def check(at: SpoolDir, draft: Draft, gaps: int = 1) -> None:
    """The bundle has every byte, and nothing is left of its making."""
    assert at.logs(draft) == draft.expected
    bundle = StoreReader.open(at.store).find(draft.zone, draft.bundle_id)
    assert bundle.header.gaps == gaps
    check_whole(bundle)
    check_clean(at.store)
    assert at.left() == []


def test_it_seals_and_tells(at: SpoolDir) -> None:
    draft = full_draft(at)
    draft.write()
    with SealerProcess(at) as sealer:
        assert sealer.wait_for("ready")
        told = sealer.seal(draft.bundle_id)
        check(at, draft)
        assert told["header"]["bundle_id"] == draft.bundle_id
        assert told["size"] == StoreReader.open(at.store).find("web", draft.bundle_id).size
        assert told["gaps"] == 1
        assert told["seal_seconds"] > 0
        progress = [message["progress"] for message in sealer.messages if "progress" in message]
        assert progress[0]["bytes_sealed"] == 0
        assert {tuple(sorted(item)) for item in progress} == {("bytes_sealed", "bytes_total", "id")}
        assert sealer.close() == 0


@pytest.mark.slow
@pytest.mark.parametrize("point", [*SEAL_POINTS, *LATER])
def test_a_crash_at_any_point_is_finished_by_the_next(at: SpoolDir, point: str) -> None:
    draft = full_draft(at)
    draft.write()
    with SealerProcess(at, crash_at=point) as sealer:
        sealer.wait_for("ready")
        sealer.send({"seal": draft.bundle_id})
        sealer.wait_crashed()
    committed = [header.metadata.bundle_id for header in StoreReader.open(at.store).bundles()]
    is_committed = SEAL_POINTS.index(point.partition(":")[0]) >= SEAL_POINTS.index("seal.committed")
    assert committed == ([draft.bundle_id] if is_committed else [])
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        if draft.entry.exists():
            sealer.seal(draft.bundle_id)
        else:
            assert point == "seal.spool-removed"
        check(at, draft)


@pytest.mark.slow
def test_crashes_at_all_points_in_turn_are_survived(at: SpoolDir) -> None:
    draft = full_draft(at)
    draft.write()
    for point in SEAL_POINTS[:-1]:
        with SealerProcess(at, crash_at=point) as sealer:
            sealer.wait_for("ready")
            sealer.send({"seal": draft.bundle_id})
            sealer.wait_crashed()
    with SealerProcess(at) as sealer:
        sealer.seal(draft.bundle_id)
        check(at, draft)


@pytest.mark.slow
@pytest.mark.parametrize("point", [name for name in trace.POINTS if name.startswith("delete.")])
def test_a_crash_in_a_deletion_is_finished_by_the_next(at: SpoolDir, point: str) -> None:
    draft, other = full_draft(at), Draft(at)
    other.add_log(b"small/3.log", log_lines(300, 3))
    other.add_log(b"big.log", log_lines(6 * CHUNK + 123))
    with SealerProcess(at, crash_at=point) as sealer:
        sealer.seal(draft.write())
        sealer.seal(other.write())
        sealer.send({"delete": {"request": 1, "zone": "web", "id": draft.bundle_id}})
        sealer.wait_crashed()
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        check(at, other)
        assert [header.metadata.bundle_id for header in StoreReader.open(at.store).bundles()] == [other.bundle_id]


@pytest.mark.slow
def test_killed_at_any_moment(at: SpoolDir) -> None:
    """Not at our points, but wherever it is."""
    dice = random.Random(5)
    drafts: list[Draft] = []
    for _ in range(6):
        draft = full_draft(at)
        (at.zone_root / "live.log").rename(at.zone_root / f"live.log.{len(drafts)}")
        draft.write()
        drafts.append(draft)
    for _ in range(12):
        with SealerProcess(at, code=PATIENT) as sealer:
            sealer.wait_for("ready")
            left = [draft for draft in drafts if draft.entry.exists()]
            for draft in left:
                sealer.send({"seal": draft.bundle_id})
            if left:
                sealer.receive()
            with contextlib.suppress(subprocess.TimeoutExpired):
                sealer.process.wait(dice.random() * 0.1)
            sealer.kill()
    with SealerProcess(at, code=PATIENT) as sealer:
        for draft in drafts:
            if draft.entry.exists():
                sealer.seal(draft.bundle_id)
        for draft in drafts:
            assert at.logs(draft) == draft.expected
        assert at.left() == []
        wait.until(lambda: _is_clean(at.store))


def move_store(at: SpoolDir, directory: Path) -> None:
    """Have the store on another file system."""
    at.store.rename(at.store.with_name("unused"))
    at.store.symlink_to(directory / "store")
    prepare(directory / "store")


def _is_clean(store: Path) -> bool:
    try:
        check_clean(store)
    except (AssertionError, FileNotFoundError):
        return False
    return True


def test_segments_of_a_deleted_interrupted_seal_are_swept(at: SpoolDir) -> None:
    draft = full_draft(at)
    draft.write()
    with SealerProcess(at, crash_at="seal.frame-written") as sealer:
        sealer.send({"seal": draft.bundle_id})
        sealer.wait_crashed()
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        assert any(at.store.rglob("*.gz"))
        sealer.send({"delete": {"request": 5, "zone": "web", "id": draft.bundle_id}})
        assert sealer.wait_for("deleted", request=5) == {"request": 5, "freed": 0}
        assert at.left() == []
        wait.until(lambda: _is_clean(at.store))


@pytest.mark.slow
def test_the_end_of_the_agent_ends_it_at_once(at: SpoolDir) -> None:
    draft = Draft(at)
    draft.add_log(b"big.log", log_lines(200 * CHUNK))
    draft.write()
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        sealer.send({"seal": draft.bundle_id})
        sealer.wait_for("progress")
        assert sealer.close() == 0
    assert list(StoreReader.open(at.store).bundles()) == []
    with SealerProcess(at) as sealer:
        sealer.seal(draft.bundle_id)
        check(at, draft)


def test_a_second_sealer_waits_for_the_first(at: SpoolDir) -> None:
    draft = Draft(at)
    draft.add_log(b"a.log", b"content")
    draft.write()
    with SealerProcess(at) as first:
        first.wait_for("ready")
        with SealerProcess(at) as second:
            second.send({"seal": draft.bundle_id})
            first.seal(draft.bundle_id)
            first.close()
            assert second.wait_for("failed")["retry_in"] is None
            check(at, draft)


def test_a_stopped_sealer_goes_on(at: SpoolDir) -> None:
    draft = Draft(at)
    draft.add_log(b"big.log", log_lines(60 * CHUNK))
    draft.write()
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        sealer.send({"seal": draft.bundle_id})
        sealer.wait_for("progress")
        sealer.process.send_signal(signal.SIGSTOP)
        sealer.send({"seal": draft.bundle_id})
        sealer.process.send_signal(signal.SIGCONT)
        sealer.wait_for("sealed")
        check(at, draft)


@pytest.mark.slow
def test_deleting_while_it_seals(at: SpoolDir) -> None:
    draft, other = Draft(at), Draft(at)
    draft.add_log(b"big.log", log_lines(150 * CHUNK))
    other.add_log(b"a.log", b"content")
    draft.write()
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        sealer.send({"seal": draft.bundle_id})
        sealer.wait_for("progress")
        sealer.send({"delete": {"request": 1, "zone": "web", "id": draft.bundle_id}})
        sealer.wait_for("deleted", request=1)
        assert not draft.entry.exists()
        sealer.seal(other.write())
        # While the other was held, what the deleted one had could not go.
        wait.until(lambda: _is_clean(at.store), timeout=20)
        check(at, other)
        assert not any(
            "sealed" in message and message["sealed"]["id"] == draft.bundle_id for message in sealer.messages
        )


def test_deleting_what_is_not_there(at: SpoolDir) -> None:
    with SealerProcess(at) as sealer:
        missing = "6f0ee1a2-4e49-4b0f-8f1c-7a4f3a3f9d11"
        sealer.send({"delete": {"request": 1, "zone": "web", "id": missing}})
        told = sealer.wait_for("deleted")
        assert told["code"] == "NotFound"
        assert told["error"] == f"No zone bundle for zone 'web' with ID '{missing}'"
        sealer.send({"delete": {"request": 2, "zone": "web", "id": "../../etc"}})
        assert sealer.wait_for("deleted", request=2)["code"] == "InvalidRequest"


def test_a_damaged_record_is_told_and_others_go_on(at: SpoolDir) -> None:
    bad, good = Draft(at), Draft(at)
    good.add_log(b"a.log", b"content")
    bad.write()
    good.write()
    record = bad.entry / "capture.jsonl"
    record.write_bytes(record.read_bytes()[:-3])
    with SealerProcess(at) as sealer:
        sealer.send({"seal": bad.bundle_id})
        sealer.send({"seal": good.bundle_id})
        told = sealer.wait_for("failed")
        assert (told["id"], told["retry_in"]) == (bad.bundle_id, None)
        assert "the record is damaged" in told["reason"]
        sealer.wait_for("sealed", id=good.bundle_id)
        assert at.logs(good) == good.expected
        assert (bad.entry / "intent.json").exists()
        sealer.send({"delete": {"request": 1, "zone": "web", "id": bad.bundle_id}})
        sealer.wait_for("deleted", request=1)
        assert at.left() == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_full_store_fails_cleanly_and_is_tried_again(at: SpoolDir, tmpfs_dir: Path) -> None:
    move_store(at, tmpfs_dir)
    ballast = tmpfs_dir / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 250 << 20)
    draft = Draft(at)
    noise = random.Random(1).randbytes(40 << 20)
    draft.add_log(b"noise.log", noise)
    draft.write()
    with SealerProcess(at) as sealer:
        sealer.send({"seal": draft.bundle_id})
        told = sealer.wait_for("failed")
        assert "no space left on device" in told["reason"]
        assert told["retry_in"] >= 1
        assert list((tmpfs_dir / "store/segments").rglob("*.gz")) == []
        assert draft.entry.is_dir()
        ballast.unlink()
        sealer.wait_for("sealed")
        check(at, draft)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_read_only_store_is_tried_again(at: SpoolDir, tmpfs_dir: Path) -> None:
    move_store(at, tmpfs_dir)
    draft, later = full_draft(at), Draft(at)
    later.add_log(b"a.log", b"content")
    with SealerProcess(at) as sealer:
        sealer.seal(draft.write())
        subprocess.run(["mount", "-o", "remount,ro", tmpfs_dir], check=True)
        sealer.send({"seal": later.write()})
        told = sealer.wait_for("failed")
        assert "read-only file system" in told["reason"]
        # What is there can be read all the time.
        assert at.logs(draft) == draft.expected
        subprocess.run(["mount", "-o", "remount,rw", tmpfs_dir], check=True)
        sealer.wait_for("sealed", id=later.bundle_id)
        check(at, later)


@pytest.mark.slow
def test_a_store_that_cannot_be_written_is_tried_again(at: SpoolDir) -> None:
    draft = full_draft(at)
    draft.write()
    # Root may write anywhere, but not where a file is in the way.
    at.store.rename(at.store.with_name("aside"))
    at.store.write_text("in the way")
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        sealer.send({"seal": draft.bundle_id})
        told = sealer.wait_for("failed")
        assert str(at.store) in told["reason"]
        at.store.unlink()
        at.store.with_name("aside").rename(at.store)
        sealer.wait_for("sealed")
        check(at, draft)


POISON = """
import os, signal
from zonebundle.seal import compress
original = compress.deflate
def deflate(raw, digest):
    if b"POISON" in bytes(raw):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(raw, digest)
compress.deflate = deflate
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 3 * CHUNK], ids=["small", "large"])
def test_a_log_that_kills_the_sealer_is_skipped_with_a_gap(at: SpoolDir, size: int) -> None:
    draft = Draft(at)
    for number in range(40):
        draft.add_log(b"%d.log" % number, log_lines(5000 if number % 2 else 2 * CHUNK + 5, number))
    draft.add_log(b"evil.log", (b"POISON\n" + log_lines(size))[:size])
    for number in range(40, 60):
        draft.add_log(b"%d.log" % number, log_lines(5000, number))
    draft.write()
    other = Draft(at, zone="other")
    other.add_log(b"big.log", log_lines(30 * CHUNK))
    other.write()
    crashes = 0
    while draft.entry.exists() or other.entry.exists():
        with SealerProcess(at, code=POISON) as sealer:
            sealer.wait_for("ready")
            for each in (draft, other):
                sealer.send({"seal": each.bundle_id})
            while (message := sealer.receive()) is not None:
                if not draft.entry.exists() and not other.entry.exists():
                    break
            crashes += message is None
        assert crashes <= 3
    assert crashes == 3
    del draft.expected[b"zone/evil.log"]
    assert at.logs(draft) == draft.expected
    assert at.logs(other) == other.expected
    gaps = json.loads(at.entries(draft)[b"report.json"][1])["gaps"]
    assert [gap for gap in gaps if gap["what"] != "pstack.7"] == [
        {"what": "logs/zone/evil.log", "reason": "skipped: the sealer crashed 3 times while it worked on it"}
    ]
    assert StoreReader.open(at.store).find("other", other.bundle_id).header.gaps == 1


@pytest.mark.slow
def test_small_bundles_are_not_stuck_behind_big_ones(at: SpoolDir) -> None:
    big, small = Draft(at, zone="big"), Draft(at, zone="small")
    data = log_lines(100 * CHUNK)
    name = big.stage_bytes(data)
    for number in range(10):
        big.add_file(b"%d.log" % number, len(data), (Part(0, len(data), "staged", 0, name, 0),))
    small.add_log(b"a.log", log_lines(10_000))
    big.write()
    small.write()
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        sealer.send({"seal": big.bundle_id})
        sealer.wait_for("progress", id=big.bundle_id)
        sealer.send({"seal": small.bundle_id})
        while (message := sealer.receive()) is not None and "sealed" not in message:
            pass
        assert message is not None
        assert message["sealed"]["id"] == small.bundle_id


@pytest.mark.slow
def test_many_small_files_and_little_memory(at: SpoolDir) -> None:
    draft = Draft(at)
    data = log_lines(1 << 20)
    pack = draft.stage_bytes(data)
    dice = random.Random(1)
    for number in range(20_000):
        size, start = dice.randrange(4096), dice.randrange(1 << 19)
        parts = (Part(0, size, "staged", 0, pack, start),) if size else ()
        draft.add_file(b"app/%d.log" % number, size, parts)
        draft.expected[b"zone/app/%d.log" % number] = data[start : start + size]
    draft.write()
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        sealer.seal(draft.bundle_id)
        check(at, draft)
        assert _peak_memory(sealer) < 150 << 20


@pytest.mark.slow
def test_thirty_bundles_at_once_and_little_memory(at: SpoolDir) -> None:
    drafts = [Draft(at, zone=f"zone-{number}") for number in range(40)]
    for number, draft in enumerate(drafts):
        draft.add_log(b"big.log", log_lines(6 * CHUNK, number))
        for small in range(200):
            draft.add_log(b"%d.log" % small, log_lines(20_000, small))
        draft.write()
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        for draft in drafts:
            sealer.send({"seal": draft.bundle_id})
        left = {draft.bundle_id for draft in drafts}
        while left:
            message = sealer.receive()
            assert message is not None
            left.discard(message.get("sealed", {}).get("id"))
        assert _peak_memory(sealer) < 150 << 20
    for draft in drafts[:3]:
        assert at.logs(draft) == draft.expected
    check_clean(at.store)
    assert at.left() == []


def _peak_memory(sealer: SealerProcess) -> int:
    """Bytes that the process had resident at most."""
    status = Path(f"/proc/{sealer.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_it_works_at_low_priority_and_alone_in_its_directories(at: SpoolDir) -> None:
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        assert os.getpriority(os.PRIO_PROCESS, sealer.process.pid) == 19
        assert os.sched_getscheduler(sealer.process.pid) == os.SCHED_BATCH
        assert (at.store / "segments").stat().st_mode & 0o777 == 0o700
        limits = resource.prlimit(sealer.process.pid, resource.RLIMIT_NOFILE)
        assert limits == resource.getrlimit(resource.RLIMIT_NOFILE)


def test_the_removal_of_an_entry_that_was_cut_short_is_finished(at: SpoolDir) -> None:
    left = at.spool / ".6f0ee1a2-4e49-4b0f-8f1c-7a4f3a3f9d11.removed"
    left.mkdir()
    (left / "outputs").write_text("x")
    with SealerProcess(at) as sealer:
        sealer.wait_for("ready")
        assert at.left() == []


def test_another_installations_area_is_left_alone(at: SpoolDir) -> None:
    draft = Draft(at)
    foreign = at.staging / snapshot_name("ffffffffffff", draft.bundle_id)
    prepare_area(foreign, "ffffffffffff")
    draft.add_area(Area("staged", str(foreign), draft.bundle_id))
    draft.write()
    with SealerProcess(at) as sealer:
        sealer.seal(draft.bundle_id)
        assert foreign.is_dir()
        assert draft.entry.is_dir()
        # What cannot be cleaned up does not keep the bundle from being deleted.
        sealer.send({"delete": {"request": 1, "zone": "web", "id": draft.bundle_id}})
        assert sealer.wait_for("deleted")["freed"] > 0
        assert foreign.is_dir()
