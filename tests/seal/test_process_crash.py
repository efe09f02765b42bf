"""The real sealer process, killed: by us, by a log, in the middle of anything."""

import contextlib
import json
import random
import subprocess

import pytest

from support import wait
from support.sealers import SealerProcess
from support.spooled import Draft, SpoolDir, check_sealed, full_draft, log_lines
from support.stored import is_clean
from zonebundle.host import trace
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader

pytestmark = pytest.mark.usefixtures("leak_check")

SEAL_POINTS = [name for name in trace.POINTS if name.startswith("seal.")]
# Points that are passed more than once, also at a later passage.
LATER = ["seal.reading:3", "seal.segment-written:4", "seal.reading:5"]
# Does not take a log for poison that was on its way at three of our kills.
PATIENT = "from zonebundle.seal import marks\nmarks.CRASHES_TO_SKIP = 1000"


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
        check_sealed(at, draft)


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
        check_sealed(at, draft)


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
        check_sealed(at, other)
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
        wait.until(lambda: is_clean(at.store))


@pytest.mark.slow
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
        wait.until(lambda: is_clean(at.store))


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
