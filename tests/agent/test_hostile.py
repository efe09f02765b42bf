"""A zone that lays traps: nothing from outside its root gets into the bundle, nothing hangs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support import wait
from support.agents import AgentProcess

SECRET = b"the host's secret, not the zone's"

# Swaps a directory for a link to the host's directory and back, as fast as it can.
SWAPPER = """
import os, sys
outside = sys.argv[1]
os.makedirs("logs/swap", exist_ok=True)
with open("logs/swap/inner.log", "w") as file:
    file.write("of the zone\\n")
os.symlink(outside, "swapped")
while True:
    os.rename("logs/swap", "aside")
    os.rename("swapped", "logs/swap")
    os.rename("logs/swap", "swapped")
    os.rename("aside", "logs/swap")
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "inner.log").write_bytes(SECRET)
    (directory / "secret.log").write_bytes(SECRET)
    return directory


def lay_traps(logs: Path, outside: Path) -> None:
    (logs / "final.log").symlink_to(outside / "secret.log")
    (logs / "absolute").symlink_to(outside)
    (logs / "relative").symlink_to(os.path.relpath(outside, logs))
    (logs / "loop").symlink_to(logs)
    os.mkfifo(logs / "fifo.log")
    listening = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(logs)
    try:
        listening.bind("socket.log")
    finally:
        os.chdir(here)
        listening.close()
    if os.geteuid() == 0:
        os.mknod(logs / "device.log", 0o600 | 0o020000, os.makedev(1, 5))
        os.link(outside / "secret.log", logs / "hard-link.log")
        os.chown(logs, 12345, 12345)
    with (logs / "sparse.log").open("wb") as sparse:
        sparse.truncate(1 << 40)
        sparse.seek((1 << 40) - 4)
        sparse.write(b"end\n")
    for name in (
        b"new\nline.log",
        b"-rf.log",
        b"not-utf8-\xff\xfe.log",
        b"\x1b[31mred.log",
        b"<b>html.log",
        b"a" * 255,
    ):
        descriptor = os.open(os.path.join(os.fsencode(logs), name), os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(descriptor, b"named " + name)
        os.close(descriptor)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["plain", "xfs", "btrfs"])
def test_a_hostile_zone(agent: AgentProcess, outside: Path, request: pytest.FixtureRequest, kind: str) -> None:
    agent.settings = '[limits]\nfile = "8MiB"\n'
    root = None if kind == "plain" else request.getfixturevalue(f"{kind}_dir") / "zone"
    if kind == "btrfs":
        assert root is not None
        subprocess.run(["btrfs", "-q", "subvolume", "create", root.parent / "pool"], check=True)
        root = root.parent / "pool/zone"
    if kind != "plain":
        # A hard link needs the same file system.
        assert root is not None
        outside = root.parent / "outside"
        outside.mkdir()
        for name in ("inner.log", "secret.log"):
            (outside / name).write_bytes(SECRET)
    root = agent.add_zone("evil", [sys.executable, "-c", SWAPPER, str(outside)], root=root)
    logs = root / "logs"
    lay_traps(logs, outside)
    agent.start().start_zones()
    wait.until((logs / "swap/inner.log").exists, what="the zone swaps")
    bundles = []
    for _ in range(5):
        created = agent.post("/zones/bundles/evil")
        assert created.status_code == 201, created.text
        bundles.append(created.json()["id"]["bundle_id"])
    told = agent.stop_zone("evil")
    bundles.append(told["bundle"]["id"]["bundle_id"])
    for bundle_id in bundles:
        contents = agent.contents("evil", bundle_id)
        assert not [name for name, data in contents.items() if SECRET in data]
        assert contents["logs/zone/logs/new\nline.log"] == b"named new\nline.log"
        assert contents["logs/zone/logs/" + "a" * 255] == b"named " + b"a" * 255
        assert contents[os.fsdecode(b"logs/zone/logs/not-utf8-\xff\xfe.log")] == b"named not-utf8-\xff\xfe.log"
        kept = f"logs/zone/logs/sparse.log.from-{(1 << 40) - (8 << 20)}"
        assert contents[kept] == bytes((8 << 20) - 4) + b"end\n"
        for name in ("final", "fifo", "socket", "device"):
            assert f"logs/zone/logs/{name}.log" not in contents
        for name in contents:
            assert not name.startswith(("/", "..")) and "/../" not in name
    if os.geteuid() == 0:
        assert "hard-link.log" in str(agent.status("evil", bundles[-1])["gaps"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hundred_thousand_files(agent: AgentProcess) -> None:
    root = agent.add_zone("many")
    for directory in range(100):
        (root / f"logs/{directory}").mkdir()
        for number in range(1000):
            with (root / f"logs/{directory}/{number}.log.1").open("wb") as file:
                file.write(b"%d of %d\n" % (number, directory))
    agent.start().start_zones()
    told = agent.stop_zone("many")
    # The budget of 2 s bounds the staging; what it did not reach is read behind, from its place.
    assert told["hold_seconds"] < 6
    bundle_id = told["bundle"]["id"]["bundle_id"]
    status = agent.wait_sealed("many", bundle_id, timeout=240)
    assert status["gaps"] == []
    contents = agent.contents("many", bundle_id)
    assert contents["logs/zone/logs/99/999.log.1"] == b"999 of 99\n"
    assert sum(name.startswith("logs/zone/") for name in contents) == 100_000
