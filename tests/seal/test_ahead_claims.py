"""What is sealed ahead stays as long as it has an owner, and gives way to all else."""

import os
import subprocess
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from support import stored, wait
from support.ahead import Compressed, Host, fill
from zonebundle.errors import FullError
from zonebundle.seal.storage import INDEX
from zonebundle.store.objects import SegmentStore


def test_what_is_removed_goes_with_the_next_run(host: Host) -> None:
    web, db = host.add("web"), host.add("db")
    fill(web, 1)
    fill(db, 2)
    host.run()
    assert len(host.segments) == 6
    (web / "app.log.4").unlink()
    assert host.run()["freed"] > 0
    assert len(host.segments) == 5
    # A pack stays as long as one of its logs is there.
    (web / "app.log.1").unlink()
    host.run()
    assert len(host.segments) == 5
    (web / "app.log.2").unlink()
    host.run()
    assert len(host.segments) == 4
    # A zone that has stopped keeps what it has; one that is gone does not.
    host.zones["db"] = False
    assert host.run()["freed"] == 0
    del host.zones["db"]
    assert host.run(complete=False)["freed"] == 0
    assert len(host.segments) == 4
    assert host.run()["freed"] > 0
    # The last of the zone web's.
    assert len(host.segments) == 1


def test_what_a_bundle_uses_stays(host: Host) -> None:
    fill(host.add())
    host.run()
    draft = host.bundle()
    before = host.segments
    host.zones.clear()
    host.run()
    assert host.segments == before
    assert host.at.logs(draft) == draft.expected
    host.sealer.delete("web", draft.bundle_id)
    assert host.segments == set()


def test_a_deleted_bundle_leaves_what_is_claimed(host: Host) -> None:
    fill(host.add())
    host.run()
    before = host.segments
    draft = host.bundle()
    host.sealer.delete("web", draft.bundle_id)
    assert host.segments == before


@pytest.mark.parametrize("gone", ["root/web/logs/deep", "root/web/logs", "root/web"])
def test_a_directory_that_goes_takes_its_segments_with_it(host: Host, gone: str) -> None:
    logs = host.add()
    (logs / "deep/er").mkdir(parents=True)
    fill(logs / "deep/er", 3)
    host.run()
    assert len(host.segments) == 3
    subprocess.run(["rm", "-r", host.at.base / gone], check=True)
    host.run()
    assert host.segments == set()


def test_a_drained_tree_is_not_read_and_keeps_its_segments(host: Host) -> None:
    logs = host.add()
    fill(logs)
    host.run()
    before = host.segments
    host.upkeep.drain(str(host.root("web")))
    (logs / "app.log.4").unlink()
    assert host.run() == {"files": 0, "bytes": 0, "known": 0, "freed": 0}
    host.restart()
    host.upkeep.drain(str(host.root("web")))
    host.run()
    assert host.segments == before
    host.upkeep.undrain(str(host.root("web")))
    assert host.run()["known"] == 3
    assert len(host.segments) == len(before) - 1


def test_a_drain_waits_for_the_log_that_is_read(host: Host, compressed: Compressed) -> None:
    fill(host.add())
    used: list[list[str]] = []
    place = str(host.root("web"))

    def drain() -> None:
        host.upkeep.drain(place)
        used.append(host.upkeep.uses(place))

    compressed.before = drain
    told = host.run()
    assert used[0] == [f"rotated logs below {place}, which are sealed ahead"]
    # Looked for once a second.
    assert told["files"] <= 4
    assert host.upkeep.uses(place) == []


def test_one_run_at_a_time(host: Host, compressed: Compressed) -> None:
    fill(host.add())
    busy: list[dict[str, Any]] = []
    compressed.before = lambda: busy.append(host.upkeep.ahead([], True, 1))
    assert host.run()["files"] == 4
    assert set(map(str, busy)) == {"{'busy': True}"}


def test_it_stops_when_asked(host: Host, compressed: Compressed) -> None:
    fill(host.add())
    compressed.before = host.upkeep.stop
    told = host.run()
    assert told["ended"] == "stopped"
    assert told["files"] < 4
    assert host.run()["files"] == 0


@pytest.mark.slow
def test_it_waits_while_the_host_is_busy(host: Host) -> None:
    fill(host.add())
    host.settle()
    host.pressure = 90.0
    told: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: told.append(host.run(settle=False)))
    thread.start()
    wait.until(lambda: host.ahead.reads(str(host.root("web"))), what="it reads")
    thread.join(0.2)
    assert thread.is_alive()
    assert host.segments == set()
    host.pressure = 10.0
    thread.join()
    assert told[0]["files"] == 4


def test_a_seal_goes_first(host: Host) -> None:
    """All turns are taken; of those that wait, the one for a seal comes before the one that asked to be last."""
    steps = threading.Semaphore(0)
    order: list[str] = []

    def ask(name: str, last: bool) -> None:
        host.workers.submit(lambda slot: None, last=last)
        order.append(name)

    for _ in range(4):
        host.workers.submit(lambda slot: steps.acquire(timeout=30))
    threads = [threading.Thread(target=ask, args=("ahead", True)), threading.Thread(target=ask, args=("seal", False))]
    for waiting, thread in enumerate(threads, start=1):
        thread.start()
        wait.until(lambda count=waiting: host.workers.waiting == count)  # type: ignore[misc]
    for turns in (1, 2):
        steps.release()
        wait.until(lambda count=turns: len(order) == count)  # type: ignore[misc]
    steps.release(2)
    for thread in threads:
        thread.join()
    assert order == ["seal", "ahead"]


def test_nothing_is_done_near_the_limit_of_the_store(host: Host) -> None:
    logs = host.add()
    fill(logs)
    host.run()
    host.upkeep.clean_up(1, ["cause", "time"], [])
    more = [logs / f"app.log.{number}" for number in range(5, 17)]
    for path in more:
        path.write_bytes(os.urandom(1 << 20))
    host.run()
    assert len(host.segments) == 15
    # 1 % of 1 GiB: what is claimed and used by no bundle goes first.
    host.upkeep.clean_up(1, ["cause", "time"], [])
    assert len(host.segments) < 15
    assert host.run() == {"ended": "full"}
    for path in more:
        path.unlink()
    host.upkeep.clean_up(50, ["cause", "time"], [])
    host.run()
    assert all(host.known(logs / f"app.log.{number}") for number in (1, 2, 3, 4))


def test_room_that_is_gone_ends_a_run(host: Host, compressed: Compressed) -> None:
    fill(host.add())

    def full() -> None:
        host.upkeep.has_room_for_ahead = False

    compressed.before = full
    assert host.run()["ended"] == "full"


def test_a_full_store(host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logs = host.add()
    fill(logs)

    def put(*_: object) -> None:
        raise FullError("writing a segment failed: no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentStore, "_write", put)
        assert [host.run()["ended"] for _ in range(3)] == ["full"] * 3
    assert capsys.readouterr().out.count("until the store has space again") == 1
    assert host.segments == set()
    assert host.run()["files"] == 4


def test_the_index_is_deleted_while_segments_wait(host: Host) -> None:
    logs = host.add()
    fill(logs)
    gone = host.add("gone")
    fill(gone, 7)
    host.run()
    before = host.segments
    host.sealer.close()
    for path in host.at.state.glob(f"{INDEX}*"):
        path.unlink()
    host.open()
    del host.zones["gone"]
    assert host.segments == before
    # They are read again, to be known; what nobody has any more goes.
    assert host.run()["files"] == 4
    assert len(host.segments) == 3
    assert host.segments < before
    host.bundle()


def test_a_bundle_in_the_spool_keeps_strays(host: Host) -> None:
    fill(host.add())
    host.run()
    host.storage.strays.make()
    waiting = host.at.spool / str(uuid.uuid4())
    waiting.mkdir()
    host.run()
    assert host.storage.strays.is_there
    waiting.rmdir()
    host.run()
    assert not host.storage.strays.is_there


@pytest.mark.parametrize("is_used", [True, False])
def test_several_stores(tmp_path: Path, is_used: bool) -> None:
    """It is made in the first, copied with a bundle, and removed from all."""
    other = tmp_path / "other"
    host = Host(tmp_path, other)
    fill(host.add())
    host.run()
    made = host.segments
    assert stored.check_segments(other) == set()
    if is_used:
        draft = host.bundle()
        assert stored.check_segments(other) == host.segments > made
        host.sealer.delete("web", draft.bundle_id)
        assert made == host.segments
    host.zones.clear()
    host.run()
    assert host.segments == stored.check_segments(other) == set()
    host.close()
