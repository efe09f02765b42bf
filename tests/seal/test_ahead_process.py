"""Sealing ahead in the real sealer process: killed, poisoned, and hung."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from support import stored, wait
from support.ahead import Host, fill
from support.sealers import SealerProcess
from support.spooled import Draft, SpoolDir
from zonebundle.model.zone import LogTree
from zonebundle.seal.storage import Storage

NOT_BUSY = "from zonebundle.seal import ahead\nahead._BUSY = 1000.0"


def ask(at: SpoolDir, *zones: str) -> dict[str, Any]:
    return {
        "request": 1,
        "do": "ahead",
        "zones": [
            {"name": zone, "is_running": True, "trees": [asdict(LogTree("zone", str(at.zone_root / zone)))]}
            for zone in zones
        ],
        "complete": True,
        "largest": 1 << 50,
    }


def seal_ahead(at: SpoolDir, *zones: str) -> dict[str, Any]:
    """A run of another sealer process; every segment is claimed afterwards, or used."""
    with SealerProcess(at, code=NOT_BUSY) as sealer:
        sealer.wait_for("ready")

        def told() -> dict[str, Any] | None:
            sealer.send({"ask": ask(at, *zones)})
            result: dict[str, Any] = sealer.wait_for("answer", request=1)["result"]
            return None if "ended" in result else result

        # A new index is told first what the bundles hold.
        result = wait.until(told)
        assert result is not None
    storage = Storage(at.state, [at.store])
    storage.usable()
    assert storage.index is not None
    segments = stored.check_segments(at.store)
    assert storage.index.claimed(segments) == segments
    storage.close()
    assert list((at.store / "segments/tmp").iterdir()) == list((at.store / "segments/pruned").iterdir()) == []
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["ahead.read", "ahead.read:3", "ahead.added", "seal.segment-written", "seal.segment-written:2"]
)
def test_killed_while_it_seals(tmp_path: Path, point: str) -> None:
    host = Host(tmp_path)
    web, gone = host.add("web"), host.add("gone")
    fill(web)
    fill(gone, 7)
    host.settle()
    host.close()
    with SealerProcess(host.at, crash_at=point, code=NOT_BUSY) as sealer:
        sealer.wait_for("ready")
        sealer.send({"ask": ask(host.at, "gone", "web")})
        sealer.wait_crashed()
    seal_ahead(host.at, "web")
    assert len(stored.check_segments(host.at.store)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("point", ["prune.forgotten", "prune.moved", "prune.removed"])
def test_killed_while_it_removes(tmp_path: Path, point: str) -> None:
    host = Host(tmp_path)
    web, gone = host.add("web"), host.add("gone")
    fill(web)
    fill(gone, 7)
    host.run()
    host.close()
    with SealerProcess(host.at, crash_at=point, code=NOT_BUSY) as sealer:
        sealer.wait_for("ready")
        sealer.send({"ask": ask(host.at, "web")})
        sealer.wait_crashed()
    seal_ahead(host.at, "web")
    assert len(stored.check_segments(host.at.store)) == 3


@pytest.mark.slow
def test_a_file_system_that_hangs_holds_up_nothing_else(at: SpoolDir) -> None:
    hanging = "import threading\nfrom zonebundle.seal.ahead import Ahead\nAhead._run = "
    hanging += "lambda self, *arguments: threading.Event().wait()"
    draft = Draft(at)
    draft.add_log(b"app.log", b"content")
    draft.write()
    with SealerProcess(at, code=hanging) as sealer:
        sealer.wait_for("ready")
        for request in range(22):
            sealer.send({"ask": ask(at, "web") | {"request": request}})
        # Whichever came first hangs.
        for _ in range(21):
            assert sealer.wait_for("answer")["result"] == {"busy": True}
        sealer.seal(draft.bundle_id)
        assert at.logs(draft) == draft.expected
        assert sealer.close() == 0


@pytest.mark.slow
def test_a_log_that_crashes_the_sealer_is_left_out(tmp_path: Path) -> None:
    host = Host(tmp_path)
    logs = host.add("web")
    fill(logs)
    (logs / "app.log.6").write_bytes(b"poison")
    host.settle()
    host.close()
    poisoned = (
        f"{NOT_BUSY}\nimport os\nfrom zonebundle.seal import compress\ndeflate = compress.deflate\n"
        "def poison(raw, digest=''):\n"
        "    if raw == b'poison':\n        os.kill(os.getpid(), 9)\n"
        "    return deflate(raw, digest)\n"
        "compress.deflate = poison"
    )
    # Once in a pack with others, then by itself until it is clear.
    for _ in range(4):
        with SealerProcess(host.at, code=poisoned) as sealer:
            sealer.wait_for("ready")
            sealer.send({"ask": ask(host.at, "web")})
            sealer.wait_crashed()
    with SealerProcess(host.at, code=poisoned) as sealer:
        sealer.wait_for("ready")
        sealer.send({"ask": ask(host.at, "web")})
        told = sealer.wait_for("answer", request=1)["result"]
    assert told["files"] + told["known"] == 4
