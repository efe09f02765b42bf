"""The real sealer process with a store that cannot be written, and with little memory."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from support.sealers import SealerProcess
from support.spooled import Draft, SpoolDir, check_sealed, full_draft, log_lines
from support.stored import check_clean
from zonebundle.model.record import Part
from zonebundle.store.pieces import CHUNK
from zonebundle.store.store import prepare

pytestmark = pytest.mark.usefixtures("leak_check")


def move_store(at: SpoolDir, directory: Path) -> None:
    """Have the store on another file system."""
    at.store.rename(at.store.with_name("unused"))
    at.store.symlink_to(directory / "store")
    prepare(directory / "store")


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
        check_sealed(at, draft)


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
        check_sealed(at, later)


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
        check_sealed(at, draft)


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
        check_sealed(at, draft)
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
