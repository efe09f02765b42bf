import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.fake_agent import FakeAgent
from support.wait import until
from zonebundle import __version__

PROGRAM = (sys.executable, "-m", "zonebundle.cli.main")
# A loaded machine may take seconds to import what a verb needs.
PATIENCE = 30.0


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ran(*arguments: str) -> tuple[int, str, str]:
    with running(*arguments) as process:
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


def on_terminal(*arguments: str) -> tuple[int, str]:
    """Run it on a terminal of its own: exit code, and what the terminal was sent."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen([*PROGRAM, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    sent = b""
    try:
        while select.select([ours], [], [], PATIENCE)[0]:
            try:
                chunk = os.read(ours, 65536)
            except OSError:
                # How Linux tells that nobody has the other end any more.
                break
            sent += chunk
        return process.wait(PATIENCE), sent.decode()
    finally:
        os.close(ours)
        process.kill()
        process.wait()


def test_the_version() -> None:
    assert ran("--version") == (0, f"zone-bundle {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing command; see `zone-bundle --help`"),
        (("stopp",), "no such command 'stopp'"),
        (("list-zones", "--al"), "no such option '--al'"),
        (("--log-level", "loud", "list-zones"), "invalid value for '--log-level'"),
        (
            ("--host", "fd00::1", "list-zones"),
            "--host 'fd00::1': TCP comes with a later version; use unix:PATH for now",
        ),
        (("--host", "unix:", "list-zones"), "--host names no socket"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    code, out, err = ran(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"zone-bundle: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_an_agent_that_is_not_there(tmp_path: Path) -> None:
    code, out, err = ran("--host", f"unix:{tmp_path}/agent.sock", "list-zones")
    assert (code, out) == (1, "")
    assert err == (
        f"zone-bundle: error: no agent answers at {tmp_path}/agent.sock (no such file or directory): start it with "
        "`zone-bundle agent`, or name its socket with --host unix:PATH or ZONE_BUNDLE_HOST\n"
    )


def test_many_requests_to_an_agent_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    code, _, err = ran("--host", f"unix:{tmp_path}/dead", "stop", "a", "b", "c")
    assert code == 1
    assert err.startswith(f"zone-bundle: error: a, b, c: no agent answers at {tmp_path}/dead (connection refused): ")
    assert err.count("\n") == 1


def test_something_else_at_the_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()

        def hang_up() -> None:
            other.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        code, _, err = ran("--host", f"unix:{tmp_path}/other", "list-zones")
        thread.join()
    assert code == 1
    assert "broke off before it had answered" in err


def test_the_environment_names_the_agent(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZONE_BUNDLE_HOST", f"unix:{agent.socket}")
    assert ran("list-zones") == (0, "db-01\nweb-01\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_is_130_and_cancels_no_stop(agent: FakeAgent, number: signal.Signals) -> None:
    agent.release = threading.Event()
    with running("--host", f"unix:{agent.socket}", "stop", "web-01", "db-01") as process:
        until(lambda: agent.stops_begun == 2, PATIENCE)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.strip() == "zone-bundle: interrupted; what the agent has begun, it finishes"


def test_interrupted_in_an_import_is_130_too(tmp_path: Path) -> None:
    # A dataclass is made by exec() of a string.
    lines = (
        "from zonebundle.cli import main, zones",
        "def interrupted(host): exec('raise KeyboardInterrupt')",
        "zones.parse_host = interrupted",
        "main.main()",
    )
    (tmp_path / "program.py").write_text("\n".join(lines))
    command = (sys.executable, "-m", "program", "list")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "zone-bundle: interrupted; what the agent has begun, it finishes"


def test_an_interrupted_get_leaves_no_file(agent: FakeAgent, tmp_path: Path) -> None:
    agent.stalled_download = threading.Event()
    bundle_id = agent.add_bundle("web-01")
    target = tmp_path / "x.tar.gz"
    arguments = ("--host", f"unix:{agent.socket}", "get", "web-01", "--bundle-id", bundle_id, "-o", str(target))
    with running(*arguments) as process:
        until(lambda: list(tmp_path.iterdir()), PATIENCE)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    agent.stalled_download.set()
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_traceback(agent: FakeAgent) -> None:
    agent.zones = {f"zone-{number:05}": "running" for number in range(20_000)}
    with running("--host", f"unix:{agent.socket}", "list-zones") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "zone-00000\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE) == 1


def test_on_a_terminal_stops_are_a_table(agent: FakeAgent) -> None:
    code, sent = on_terminal("--host", f"unix:{agent.socket}", "stop", "--all", "--wait")
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert f"Zone    {'Bundle ID':36}  Hold      Stop      Gaps" in lines
    for zone in ("db-01", "web-01"):
        (bundle_id,) = [key for key, value in agent.bundles.items() if value == zone]
        assert f"{zone:6}  {bundle_id}  4.1 ms    30.1 ms   0" in lines
    assert any(line.startswith("sealing ") for line in lines)


def test_a_bundle_is_not_written_to_a_terminal(agent: FakeAgent) -> None:
    bundle_id = agent.add_bundle("web-01")
    code, sent = on_terminal("--host", f"unix:{agent.socket}", "get", "web-01", "--bundle-id", bundle_id, "-o", "-")
    assert code == 2
    assert "a bundle is binary: redirect stdout, or name a file with --output" in sent


def test_the_agent_refuses_a_wrong_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[hold]\nbudgt = "2s"\n')
    code, out, err = ran("agent", "--config", str(file))
    assert (code, out) == (2, "")
    assert err == f"zone-bundle: error: {file}: hold.budgt: unknown key; known here: budget, must-keep, copy\n"


@pytest.mark.parametrize(
    ("arguments", "allowed"), [(["--help"], set()), (["--version"], set()), (["list-zones"], {"httpx"})]
)
def test_the_start_imports_only_what_it_needs(arguments: list[str], allowed: set[str]) -> None:
    look = f"""
import sys
from zonebundle.cli.main import run
run({arguments!r})
heavy = {{"asyncio", "httpx", "pydantic", "rich", "fastapi", "structlog", "isal", "blake3", "ssl"}}
print("imported:", *sorted(heavy & set(sys.modules)))
"""
    environment = {**os.environ, "ZONE_BUNDLE_HOST": "unix:/nonexistent/agent.sock"}
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, env=environment, timeout=PATIENCE, check=True
    )
    imported = set(done.stdout.splitlines()[-1].split()[1:])
    # httpx needs these two itself.
    assert imported - {"asyncio", "ssl"} <= allowed if allowed else not imported
