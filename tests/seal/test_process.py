"""The real sealer process: what it is told and tells, stopped, and beside another one."""

import os
import resource
import signal

import pytest

from support import wait
from support.sealers import SealerProcess
from support.spooled import Draft, SpoolDir, check_sealed, full_draft, log_lines
from support.stored import is_clean
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area, Part
from zonebundle.snapshots.areas import prepare_area
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader

pytestmark = pytest.mark.usefixtures("leak_check")


def test_it_seals_and_tells(at: SpoolDir) -> None:
    draft = full_draft(at)
    draft.write()
    with SealerProcess(at) as sealer:
        assert sealer.wait_for("ready")
        told = sealer.seal(draft.bundle_id)
        check_sealed(at, draft)
        assert told["header"]["bundle_id"] == draft.bundle_id
        assert told["size"] == StoreReader.open(at.store).find("web", draft.bundle_id).size
        assert told["gaps"] == 1
        assert told["seal_seconds"] > 0
        progress = [message["progress"] for message in sealer.messages if "progress" in message]
        assert progress[0]["bytes_sealed"] == 0
        assert {tuple(sorted(item)) for item in progress} == {("bytes_sealed", "bytes_total", "id")}
        assert sealer.close() == 0


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
        check_sealed(at, draft)


@pytest.mark.slow
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
            check_sealed(at, draft)


@pytest.mark.slow
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
        check_sealed(at, draft)


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
        wait.until(lambda: is_clean(at.store), timeout=20)
        check_sealed(at, other)
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
