import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.wait import until
from zonebundle.cli import demo_workload

PROGRAM = (sys.executable, "-I", "-S", demo_workload.__file__)
FULL = 60_000
FILES = 4


@contextlib.contextmanager
def service(root: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = ("--service", "db-01", "--files", str(FILES), "--file-bytes", str(FULL), "queries", "slow")
    command = [*PROGRAM, *arguments]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            # Workers that a failing test leaves would run on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def sizes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (root / "logs").iterdir()}


def test_it_writes_and_rotates_logs_of_json_lines(tmp_path: Path) -> None:
    with service(tmp_path) as process:
        until((tmp_path / "ready").exists)
        before = sizes(tmp_path)
        assert set(before) == {
            f"{log}.log{age}" for log in ("queries", "slow") for age in ("", *(f".{n}" for n in range(1, FILES)))
        }
        assert all(size >= FULL for name, size in before.items() if not name.endswith(".log"))
        # It goes on logging.
        until(lambda: sizes(tmp_path)["queries.log"] > before["queries.log"])
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert out.splitlines() == [f"db-01: 2 workers, process {process.pid}", "db-01: ended"]
    lines = [json.loads(line) for age in (".3", ".2", ".1", "") for line in _lines(tmp_path, f"queries.log{age}")]
    times = [line["time"] for line in lines[:-1]]
    assert times == sorted(times)
    assert lines[-1]["last"] == "words"


def _lines(root: Path, name: str) -> list[str]:
    return (root / "logs" / name).read_text().splitlines()


@pytest.mark.parametrize("ready", [False, True])
def test_it_ends_when_asked_to_at_any_time(tmp_path: Path, ready: bool) -> None:
    with service(tmp_path) as process:
        until((tmp_path / ("ready" if ready else "logs")).exists)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
        assert process.returncode == 0
