"""What is wrong from outside: requests, configurations, directories, disks. Each is told in one clear line."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import filesystems, wait
from support.agents import AgentProcess
from support.users import OrdinaryUser

SOME_ID = "1c8a9e0e-7d4e-4b8e-9f0a-0123456789ab"
TALKS = """
trap 'echo "last words" >> logs/app.log; exit 0' TERM
echo "first words" >> logs/app.log
while :; do sleep 0.05; done
"""


def refusal(answer: Any, status: int, code: str) -> str:
    """The message of an error; its shape is checked."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error_code", "message", "request_id"}
    assert body["error_code"] == code
    assert answer.headers["x-request-id"] == body["request_id"]
    assert body["message"].isprintable()
    return str(body["message"])


def start_refused(agent: AgentProcess, status: int = 1, **options: Any) -> str:
    """Start an agent that must not run; the one line that it printed."""
    agent.write_config()
    done = subprocess.run(
        [sys.executable, "-m", "zonebundle.cli.main", "agent", "--config", agent.config],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    assert done.returncode == status, done
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return str(line)


@pytest.mark.slow
def test_requests_that_are_wrong(agent: AgentProcess) -> None:
    agent.add_zone("web")
    agent.start().start_zones()
    asks: list[tuple[Callable[..., Any], str]] = [
        (agent.get, "/zones/{}"),
        (agent.post, "/zones/{}/stop"),
        (agent.post, "/zones/{}/start"),
        (agent.get, "/zones/bundles/{}"),
        (agent.post, "/zones/bundles/{}"),
    ]
    for ask, path in asks:
        assert "no zone named 'nobody'" in refusal(ask(path.format("nobody")), 404, "NotFound")
        for bad in ("a%20b", "a%0Ab", "%1B[31m", "x" * 201, "caf%C3%A9", "-%00"):
            assert "cannot be a zone's name" in refusal(ask(path.format(bad)), 400, "InvalidRequest")
    for grace in ("soon", "-1s", "", "inf", "nan", "1" * 400, "1e5", "٣s"):
        assert refusal(agent.post("/zones/web/stop", grace=grace), 400, "InvalidRequest").startswith("grace: ")
    for key in ("remove", "bundle"):
        assert key in refusal(agent.post("/zones/web/stop", **{key: "perhaps"}), 400, "InvalidRequest")
    for ask_bundle in (agent.get, agent.delete):
        for bad in ("1", "not-a-uuid", "%0A", SOME_ID + "0"):
            assert "is not a bundle ID" in refusal(ask_bundle(f"/zones/bundles/web/{bad}"), 400, "InvalidRequest")
        for zone in ("web", "nobody"):
            # Omicron's line.
            expected = f"No zone bundle for zone '{zone}' with ID '{SOME_ID}'"
            assert refusal(ask_bundle(f"/zones/bundles/{zone}/{SOME_ID}"), 404, "NotFound") == expected
    refusal(agent.get(f"/zones/bundles/web/{SOME_ID}/status"), 404, "NotFound")
    refusal(agent.get("/nowhere"), 404, "NotFound")
    assert agent.get("/zones/web/stop").status_code == 405
    assert refusal(agent.post("/zones/web/start"), 409, "Conflict").startswith("zone 'web' runs already")
    # None of it has touched the zone.
    assert agent.zone_state("web") == "running"
    assert agent.bundles("web") == []
    assert agent.spool_entries() == []
    assert agent.stop_zone("web", grace="9999999999999d")["gaps"] == 0
    assert "Traceback" not in agent.log.read_text()


@pytest.mark.slow
def test_bytes_that_are_no_request_cost_nobody_else_anything(agent: AgentProcess) -> None:
    agent.start()
    for garbage in (
        b"\0" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"/x" * 100_000,
        b"POST /zones HTTP/1.1\r\nConte",
    ):
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(str(agent.socket))
            sock.settimeout(0.2)
            sock.sendall(garbage)
            sock.recv(1000)
    assert agent.get("/zones").json() == []
    assert "Traceback" not in agent.log.read_text()


@pytest.mark.slow
def test_a_bad_configuration(agent: AgentProcess) -> None:
    agent.settings = '[hold]\nbudgt = "2s"\n'
    line = start_refused(agent, 2)
    assert str(agent.config) in line and "hold.budgt" in line and "budget" in line
    agent.settings = '[hold]\nbudget = "two"\n'
    line = start_refused(agent, 2)
    assert str(agent.config) in line and "hold.budget" in line and "500ms" in line
    agent.settings = "[hold\n"
    assert str(agent.config) in start_refused(agent, 2)
    assert not agent.state.exists()
    assert not agent.socket.exists()


def test_no_configuration(agent: AgentProcess) -> None:
    missing = agent.directory / "missing.toml"
    done = subprocess.run(
        [sys.executable, "-m", "zonebundle.cli.main", "agent", "--config", missing],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert str(missing) in line


@pytest.mark.slow
def test_an_occupied_socket(agent: AgentProcess, tmp_path: Path) -> None:
    agent.add_zone("web")
    agent.start().start_zones()
    (tmp_path / "second").mkdir()
    with AgentProcess(tmp_path / "second") as other:
        other.socket = agent.socket
        line = start_refused(other)
        assert f"unix:{agent.socket} is in use" in line
        assert not other.state.exists()
    # The first one does not notice, and its socket is still there.
    assert agent.zone_state("web") == "running"
    assert agent.stop_zone("web")["gaps"] == 0


@pytest.mark.slow
def test_a_state_directory_of_another_agent(agent: AgentProcess, tmp_path: Path) -> None:
    agent.add_zone("web")
    agent.start().start_zones()
    with AgentProcess(agent.directory) as other:
        config, before = other.config, agent.config.read_bytes()
        line = start_refused(other)
        assert f"another agent uses the state directory {agent.state}" in line
        assert not other.socket.exists()
        config.write_bytes(before)
    assert agent.stop_zone("web")["gaps"] == 0


@pytest.mark.slow
def test_the_socket_of_a_killed_agent_is_taken_over(agent: AgentProcess) -> None:
    agent.start()
    agent.kill()
    assert agent.socket.is_socket()
    agent.start()
    assert agent.get("/zones").json() == []
    assert agent.terminate() == 0
    assert not agent.socket.exists()


@pytest.mark.slow
def test_a_file_in_the_place_of_the_socket(agent: AgentProcess) -> None:
    agent.socket.write_text("precious")
    line = start_refused(agent)
    assert f"unix:{agent.socket}" in line and "[agent] listen" in line
    assert agent.socket.read_text() == "precious"
    agent.socket.unlink()
    agent.socket.mkdir()
    assert f"unix:{agent.socket}" in start_refused(agent)
    agent.socket.rmdir()


def test_an_ordinary_user_and_a_store_of_root(agent: AgentProcess, ordinary_user: OrdinaryUser, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a directory that the user may not write")
    if not ordinary_user.can_read(Path(sys.executable)) or not ordinary_user.can_read(Path(__file__)):
        pytest.skip("the interpreter or the sources are out of an ordinary user's reach")
    closed = Path(ordinary_user.home, "closed")
    closed.mkdir(mode=0o755)
    with AgentProcess(ordinary_user.home) as theirs:
        theirs.stores = [closed]
        Path(theirs.socket.parent).chmod(0o777)
        line = start_refused(theirs, cwd=ordinary_user.home, **ordinary_user.popen_arguments)
        assert f"the store {closed} cannot be written" in line and "[store] dirs" in line
        theirs.stores = [closed / "store"]
        line = start_refused(theirs, cwd=ordinary_user.home, **ordinary_user.popen_arguments)
        assert f"the store {closed / 'store'} cannot be written" in line


@pytest.mark.slow
@pytest.mark.parametrize("what", ["store", "state"])
def test_a_read_only_mount(agent: AgentProcess, tmpfs_dir: Path, what: str) -> None:
    if what == "store":
        agent.stores = [tmpfs_dir]
    else:
        shutil.rmtree(agent.state, ignore_errors=True)
        agent.state.symlink_to(tmpfs_dir)
    subprocess.run(["mount", "-o", "remount,ro", tmpfs_dir], check=True)
    try:
        line = start_refused(agent)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", tmpfs_dir], check=True)
    assert f"the {'store' if what == 'store' else 'state directory'}" in line
    assert "cannot be" in line and "read-only" in line.lower()


@pytest.mark.slow
def test_a_store_of_a_newer_format(agent: AgentProcess) -> None:
    agent.add_zone("web")
    agent.start().start_zones()
    agent.wait_sealed("web", agent.stop_zone("web")["bundle"]["id"]["bundle_id"])
    agent.terminate()
    (agent.state / "store/format").write_text("zonebundle store 999\n")
    line = start_refused(agent)
    assert str(agent.state / "store") in line and "999" in line and "newer" in line
    assert (agent.state / "store/format").read_text() == "zonebundle store 999\n"
    (agent.state / "store/format").write_text("something else\n")
    assert "not a store's format file" in start_refused(agent)
    agent.zones.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"state": 999, "installation": "0123456789ab", "staging": []}',
        b'{"state": 1}',
        b'{"state": 1, "installation": 5, "staging": []}',
        b'{"state": 1, "installation": "../../etc", "staging": []}',
        b'{"state": 1, "installation": "0123456789ab", "staging": "x"}',
    ],
)
def test_a_damaged_state_file(agent: AgentProcess, content: bytes) -> None:
    agent.state.mkdir(mode=0o700)
    (agent.state / "state.json").write_bytes(content)
    line = start_refused(agent)
    assert str(agent.state / "state.json") in line
    assert (agent.state / "state.json").read_bytes() == content


@pytest.mark.slow
def test_garbage_in_the_spool_costs_only_itself(agent: AgentProcess) -> None:
    spool = agent.state / "spool"
    spool.mkdir(mode=0o700, parents=True)
    (spool / "a-file").write_text("x")
    (spool / "a-directory").mkdir()
    names = [str(uuid.uuid4()) for _ in range(8)]
    (spool / names[0]).write_text("a file with the name of an entry")
    (spool / names[1]).mkdir()
    for name, intent in zip(names[2:5], (b"", b"[]", b'{"metadata": {}}'), strict=True):
        (spool / name).mkdir()
        (spool / name / "intent.json").write_bytes(intent)
    for name, record in zip(names[5:7], (b"", b"\xff\n{"), strict=True):
        (spool / name).mkdir()
        (spool / name / "capture.jsonl").write_bytes(record)
    (spool / names[7]).symlink_to("/etc")
    agent.add_zone("web")
    agent.start().start_zones()
    told = agent.stop_zone("web")
    assert told["gaps"] == 0
    agent.wait_sealed("web", told["bundle"]["id"]["bundle_id"])
    # Nothing was begun in this one; what may be evidence is kept, and named in the log.
    assert not (spool / names[1]).exists()
    for name in [names[0], *names[2:], "a-file", "a-directory"]:
        assert os.path.lexists(spool / name), name
        assert name in agent.log.read_text(), name
    assert "Traceback" not in agent.log.read_text()


@pytest.mark.slow
def test_sigterm_during_a_stop(agent: AgentProcess) -> None:
    root = agent.add_zone("web", ["sh", "-c", TALKS.replace("trap '", "trap 'sleep 1; ")])
    agent.start().start_zones()
    wait.until((root / "logs/app.log").exists, what="the zone writes")
    asking = subprocess.Popen(
        [*(sys.executable, "-m", "zonebundle.cli.main"), *("--host", f"unix:{agent.socket}", "stop", "web", "--json")],
        stdout=subprocess.PIPE,
    )
    with asking:
        wait.until(lambda: agent.zone_state("web") == "stopping", what="the stop is on its way")
        assert agent.process is not None
        agent.process.send_signal(signal.SIGTERM)
        output, _ = asking.communicate(timeout=60)
    assert asking.returncode == 0
    told = json.loads(output)[0]
    assert (told["state"], told["gaps"]) == ("stopped", 0)
    assert agent.terminate() == 0
    agent.start()
    assert agent.zone_state("web") == "stopped"
    bundle_id = told["bundle"]["id"]["bundle_id"]
    agent.wait_sealed("web", bundle_id)
    assert agent.contents("web", bundle_id)["logs/zone/logs/app.log"] == b"first words\nlast words\n"


SIGNALED_TWICE = """
import os, signal, sys
from zonebundle.api import serve
ignore = serve._ignore_signals
number = int(sys.argv.pop(1))
serve._ignore_signals = lambda: (os.kill(os.getpid(), number), ignore(), os.kill(os.getpid(), number))
from zonebundle.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_just_when_the_first_is_heeded(agent: AgentProcess, number: signal.Signals) -> None:
    agent.write_config()
    command = [sys.executable, "-c", SIGNALED_TWICE, str(int(number)), "agent", "--config", str(agent.config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        agent.process = process
        agent.wait_ready()
        process.send_signal(number)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"agent has stopped" in log


@pytest.mark.slow
@pytest.mark.parametrize("reserve", [True, False])
def test_a_full_disk_under_the_state(small_disk: Path, agent: AgentProcess, tmp_path: Path, reserve: bool) -> None:
    state = small_disk / "state"
    state.mkdir(mode=0o700)
    agent.state.symlink_to(state)
    agent.stores = [tmp_path / "store"]
    agent.settings = '[hold]\nbudget = "20s"\n[evidence]\ncommands = [["echo", "hello"]]\n'
    root = agent.add_zone("web", ["sh", "-c", TALKS])
    (root / "logs/app.log.1").write_bytes(b"rotated\n" * 1000)
    agent.start().start_zones()
    wait.until((root / "logs/app.log").exists, what="the zone writes")
    # The sealer makes its index at its start, which must not meet the disk while it fills.
    agent.wait_sealed("web", agent.post("/zones/bundles/web").json()["id"]["bundle_id"])
    if not reserve:
        (state / "reserve").unlink()
    filesystems.fill(small_disk)

    told = agent.stop_zone("web")

    assert told["state"] == "stopped"
    assert (root / "logs/app.log").read_bytes() == b"first words\nlast words\n"
    assert "Traceback" not in agent.log.read_text()
    # Nothing waits for an intent that cannot be written.
    assert told["hold_seconds"] < 10
    if told["bundle"] is None:
        assert not reserve
        # There may have been room for the entry's directory, and none for anything in it.
        lost = {gap["what"] for gap in told["reasons"]}
        assert lost in ({"not-recoverable", "bundle"}, {"not-recoverable", "record"})
        assert told["gaps"] == len(told["reasons"]) >= 2
        assert "No space left on device" in str(told["reasons"])
    else:
        bundle_id = told["bundle"]["id"]["bundle_id"]
        assert bundle_id in [bundle["id"]["bundle_id"] for bundle in agent.bundles("web")]
    (small_disk / "filler").unlink()
    # The next stop has room again, and what was recorded is sealed.
    agent.start_zones()
    wait.until(lambda: (root / "logs/app.log").read_bytes().count(b"first") == 2, what="the zone writes")
    again = agent.stop_zone("web")
    assert again["gaps"] == 0, again
    for bundle in agent.bundles("web"):
        contents = agent.contents("web", bundle["id"]["bundle_id"])
        assert contents["logs/zone/logs/app.log.1"] == b"rotated\n" * 1000
    assert re.search("no space", agent.log.read_text(), re.IGNORECASE)
    wait.until(lambda: _allocated(state / "reserve") >= 4 << 20, what="the reserve is taken again")
    agent.terminate()
    agent.start()
    # What was staged for a bundle that could never be made goes at the next start, as nothing refers to it.
    wait.until(lambda: not _areas(agent), what="no area is left")


def _areas(agent: AgentProcess) -> list[Path]:
    noted = json.loads((agent.state / "state.json").read_text())
    return [area for staging in noted["staging"] for area in Path(staging).glob(f"zb-{noted['installation']}-*")]


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0
